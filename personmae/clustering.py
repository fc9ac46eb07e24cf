"""What each epoch of unsupervised training learns from: clusters of all images' features, and the memory of their means.

The first rank clusters and all get its labels. True identities are read for the log alone.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from personmae import config, dist, downstream
from personmae.errors import Stopped, UserError
from personmae.monitor import run_log
from personmae.reid import cluster
from personmae.reid.cluster_quality import ClusterQuality, follows_cameras, one_camera_share, quality
from personmae.reid.datasets import Benchmark, pids_and_camids
from personmae.reid.features import extract, require_finite, timed
from personmae.reid.memory import CameraMemory, ClusterMemory, camera_proxies, mean_centroids
from personmae.reid.retrieval import per_camera
from personmae.reid.transforms import ImageSet
from personmae.system import files


class Module(downstream.Trained, Protocol):
    """A ReID model and the memory that its features are compared with."""

    memory: ClusterMemory


class ClusteredState(downstream.DownstreamState, Protocol):
    """What is known of a run. ``labels`` (N,) are the clusters of the training images, -1 for an outlier."""

    labels: np.ndarray | None

    @property
    def settings(self) -> config.Unsupervised: ...
    @property
    def module(self) -> Module: ...


def find_clusters(
    state: ClusteredState, images: ImageSet, epoch: int, log: run_log.RunLog, stopped: Callable[[], bool]
) -> None:
    """Label the images by the clusters of their features, and begin the memory with the means of these.

    Raises:
        UserError: there are fewer clusters than a batch needs.
        Stopped: ``stopped`` was true on a rank. The state is as it was.
        Diverged: a feature is not finite.
    """
    settings, device = state.settings, state.world.device
    features = _features(state, images, log, stopped)
    pids, camids = pids_and_camids(state.benchmark.train)

    def find() -> Tensor:
        compared = as_compared(features, camids, settings.cluster).to(device)
        options = settings.cluster.model_dump(include={"k1", "k2", "eps", "min_samples"})
        return torch.from_numpy(cluster.pseudo_labels(compared, **options))

    with timed(log.log, f"clustering {len(images):,} images"):
        found = dist.on_first_rank(find)
    all_labels = dist.broadcast(torch.zeros(len(images), dtype=torch.int64) if found is None else found).numpy()
    if dist.any_rank(stopped()):
        raise Stopped("after a clustering")
    labels = cluster.without_one_camera(all_labels, camids) if settings.cluster.drop_one_camera else all_labels
    if state.world.is_first:
        scores = quality(labels, pids, camids)
        if scores.one_camera_share is not None:  # of what was found, whether it is dropped or not
            scores = replace(scores, one_camera_share=one_camera_share(all_labels, camids))
        _record(state, epoch, scores, log)
    _require_enough(labels, epoch, settings)
    state.labels = labels
    targets = torch.from_numpy(memory_targets(labels, camids, settings.memory)).to(device)
    centroids = mean_centroids(features.to(device), targets)
    state.module.memory = build_memory(centroids, labels, camids, settings.memory)


def as_compared(features: Tensor, camids: np.ndarray, settings: config.Cluster) -> Tensor:
    """Features (N, F) of length one as the clustering compares them. ``per_camera`` says what of cameras is taken out."""
    whitening = {"dim": settings.whiten_dim, "shrinkage": settings.whiten_shrinkage}
    return per_camera(features, camids, settings.per_camera, **whitening)


def memory_targets(labels: np.ndarray, camids: np.ndarray, settings: config.Memory) -> np.ndarray:
    """Which of the memory's centroids each image belongs to, (N,), -1 for an outlier."""
    return camera_proxies(labels, camids).labels if settings.kind == "camera" else labels


def build_memory(centroids: Tensor, labels: np.ndarray, camids: np.ndarray, settings: config.Memory) -> ClusterMemory:
    """The memory of an epoch, new or out of a checkpoint, on the device of its ``centroids``."""
    common = settings.model_dump(include={"mode", "momentum", "temperature"})
    if settings.kind == "cluster":
        return ClusterMemory(centroids, **common)
    proxies = camera_proxies(labels, camids)
    clusters, cameras = (torch.from_numpy(of).to(centroids.device) for of in (proxies.clusters, proxies.cameras))
    of_proxies = settings.model_dump(include={"intra_weight", "inter_weight", "num_negatives"})
    return CameraMemory(centroids, clusters, cameras, **common, **of_proxies)


def require_cameras(settings: config.Unsupervised, benchmark: Benchmark) -> None:
    """Raise a UserError where an option needs cameras that the training images do not name."""
    camids = pids_and_camids(benchmark.train)[1]
    num_cameras = len(np.unique(camids[camids >= 0]))
    wanted = [("cluster.drop_one_camera=true", settings.cluster.drop_one_camera)]
    wanted += [("memory.kind=camera", settings.memory.kind == "camera")]
    if num_cameras < 2 and (named := [option for option, is_wanted in wanted if is_wanted]):
        raise UserError(
            f"{named[0]} needs training images of two cameras or more, and {benchmark.root} names {num_cameras}. "
            "Leave it out, or give the cameras"
        )


def trim_clusters(run_dir: Path, step: int) -> None:
    """Leave those lines of ``clusters.jsonl`` that a run which goes on at ``step`` will not write again."""
    files.cut_lines(run_dir / run_log.CLUSTERS, lambda record: record["step"] < step)


def _features(state: ClusteredState, images: ImageSet, log: run_log.RunLog, stopped: Callable[[], bool]) -> Tensor:
    """Features of all images on every rank, of length one, in evaluation mode."""
    settings = state.settings
    dist.average_buffers(state.module.model)
    with timed(log.log, f"extracting {len(images):,} images"):
        features = extract(
            state.module.model,
            images,
            batch_size=settings.train.extract_batch_size,
            device=state.world.device,
            mean=state.model_settings["mean"],
            std=state.model_settings["std"],
            dtype=state.module.compute_dtype,
            stopped=stopped,
            log=log.log,
        )
    require_finite(features, state.step)
    return features


def _record(state: ClusteredState, epoch: int, scores: ClusterQuality, log: run_log.RunLog) -> None:
    """Say how good the clusters are, and write it down."""
    shown = {name: value for name, value in asdict(scores).items() if value is not None}
    words = (f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}" for name, value in shown.items())
    log.log(f"epoch {epoch}: {'  '.join(words)}")
    if follows_cameras(scores.ami_cameras, scores.one_camera_share):
        log.log(_warning(scores, state.settings))
    with (Path(state.settings.run_dir) / run_log.CLUSTERS).open("a", encoding="utf-8") as file:
        file.write(files.to_json({"epoch": epoch, "step": state.step, **shown}) + "\n")


def _warning(scores: ClusterQuality, settings: config.Unsupervised) -> str:
    """One line on clusters that follow cameras, with what to set."""
    if settings.cluster.per_camera != "whiten":
        change = "Set cluster.per_camera=whiten"
    elif settings.feature.pool != "rows":
        change = "Set feature.pool=rows"
    else:
        change = "Start from a better encoder"
    return (
        f"warning: clusters follow cameras: {scores.one_camera_share:.0%} of them are of one camera, and their adjusted mutual "
        f"information with cameras is {scores.ami_cameras:.2f}. {change}, unless people really are seen by one camera"
    )


def _require_enough(labels: np.ndarray, epoch: int, settings: config.Unsupervised) -> None:
    num_clusters, num_outliers = int(labels.max(initial=-1)) + 1, int((labels < 0).sum())
    if num_clusters >= settings.batch.num_ids:
        return
    change = "Raise" if 2 * num_outliers > len(labels) else "Lower"  # few clusters of all are too large ones
    raise UserError(
        f"batch.num_ids={settings.batch.num_ids} clusters a batch are required, and epoch {epoch} has "
        f"{num_clusters} with {num_outliers} of {len(labels)} images in none. "
        f"{change} cluster.eps={settings.cluster.eps:g}, lower batch.num_ids, or start from a better encoder"
    )
