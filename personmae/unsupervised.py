"""ReID without labels: clusters of the images' features are their classes, found anew before every epoch (arXiv 2103.11568).

From a pre-trained encoder this is unsupervised learning (USL). From one fine-tuned on another benchmark it is unsupervised
domain adaptation (UDA), which uses no source image. True identities are read for the log alone.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personmae import config, dist, downstream, optim
from personmae.checkpoint import portable
from personmae.checkpoint.writer import Writer
from personmae.clustering import build_memory, find_clusters, memory_targets, require_cameras, trim_clusters
from personmae.config import RANDOM
from personmae.downstream import augmented, whitening_of
from personmae.engine.base import Engine
from personmae.engine.native import NativeEngine
from personmae.errors import Stopped
from personmae.guard import Guard
from personmae.model.vit import build_encoder, share_drop_path
from personmae.monitor import run_log
from personmae.monitor.rank_metrics import RankMetrics
from personmae.precision import Precision
from personmae.reid.datasets import Benchmark, pids_and_camids
from personmae.reid.heads import Neck, ReIDModel, encoder_weights, settings_from
from personmae.reid.memory import ClusterMemory
from personmae.reid.sampler import cluster_batches
from personmae.reid.transforms import ImageSet, load_ahead


@dataclass
class UnsupervisedState:
    """What a run is made of, and how far it has come. ``labels`` are the clusters of the epoch that ``step`` is in."""

    settings: config.Unsupervised
    world: dist.World
    benchmark: Benchmark
    module: "ClusterContrast"
    model_settings: dict[str, Any]  # architecture and preprocessing, which travel with the weights
    engine: Engine
    resume_key: dict[str, Any]  # what must agree before the run is resumed
    precision: Precision
    step: int = 0
    labels: np.ndarray | None = None

    @property
    def total_steps(self) -> int:
        return self.settings.train.epochs * self.settings.train.iters_per_epoch


def run(settings: config.Unsupervised) -> None:
    """Train all epochs, resuming what the run directory holds, then evaluate. Writes ``result.json``.

    Raises:
        UserError: the configuration, the weights or the benchmark cannot be used, or there are too few clusters.
        Stopped: a signal asked for it. The state is saved.
        Diverged: gradients are no longer finite.
    """
    parts = downstream.Parts("unsupervised", require_cameras, build_state, load, log_setup, train)
    downstream.run(settings, parts)


def build_state(settings: config.Unsupervised, world: dist.World, benchmark: Benchmark, chosen: Precision) -> UnsupervisedState:
    """The state of step 0."""
    torch.manual_seed(settings.seed)
    module, model_settings = build(settings, chosen)
    module.to(world.device).train()
    known = downstream.resume_key(settings, benchmark, chosen.name)
    engine = build_engine(settings, module)
    return UnsupervisedState(settings, world, benchmark, module, model_settings, engine, known, chosen)


def train(
    state: UnsupervisedState, found: Path | None, log: run_log.RunLog, metrics: RankMetrics, stop: dist.StopSignal
) -> None:
    """The loop: from the state that was ``found``, or from the start, to the last step."""
    settings, world, engine, total_steps = state.settings, state.world, state.engine, state.total_steps
    guard = Guard(world.device, max_skipped_steps=settings.train.max_skipped_steps)
    size = settings.batch.num_ids * settings.batch.num_instances
    ours, silent = dist.share(size), True  # the first step is shown at once
    share_drop_path(state.module, size, ours)
    if world.is_first:
        trim_clusters(Path(settings.run_dir), state.step)
    with (
        downstream.open_images(state, log) as images,
        closing(downstream.build_saver(state, found, save, guard, metrics, stop)) as saver,
    ):

        def stopped() -> bool:
            metrics.beat("evaluate", state.step)
            return stop.requested

        def cluster(epoch: int) -> None:
            try:
                find_clusters(state, images, epoch, log, stopped)
            except Stopped as early:
                saver.stop(state.step, during=str(early))

        for decoded, labels in batches(state, images, ours, cluster):
            metrics.beat("step", state.step)
            metrics.enter("inputs")
            batch = {"images": augmented(state, decoded, size, ours), "labels": labels[ours]}
            metrics.enter("forward_backward")
            outputs = engine.forward_backward(batch, last_micro=True)
            metrics.enter("optimizer")
            lr_scale = lr_scale_at(settings, state.step)
            _, skipped = engine.step(lr_scale)
            guard.add(outputs["loss"], skipped)
            # By the global batch in its order, so that the memory is the same for any number of ranks.
            state.module.memory.update(dist.gather_rows(outputs["features"], size), labels, skipped)
            state.step += 1

            metrics.count(state.step, size)
            log.advance(state.step)
            in_turn = state.step % settings.train.log_every == 0 or state.step == total_steps
            if silent or in_turn:
                values = {"loss": dist.mean(outputs["loss"]).item(), "lr": lr_scale * settings.optim.lr}
                (log.record if in_turn else log.display)(state.step, values, images_per_step=size)
            if in_turn:
                guard.last_counted(state.step, settings.run_dir)  # ends a run whose gradients stay infinite
            silent = saver.at(state.step, silent=log.is_due())
            metrics.enter("data_wait")
        saver.end(state.step)


class ClusterContrast(nn.Module):
    """A ReID model and the loss of its features against a memory of clusters, which must be set before the first step.

    ``forward`` takes ``images`` (B, 3, H, W), normalised, and ``labels`` (B,).
    """

    def __init__(self, model: ReIDModel, *, compute_dtype: torch.dtype):
        super().__init__()
        self.model, self.compute_dtype = model, compute_dtype
        self.memory: ClusterMemory

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = batch["images"]
        with torch.autocast(images.device.type, self.compute_dtype, self.compute_dtype != torch.float32):
            (embedding,) = self.model(images)["embeddings"]
        features = F.normalize(embedding.float(), dim=1)
        return {"loss": self.memory.loss(features, batch["labels"]), "features": features}


def batches(
    state: UnsupervisedState, images: ImageSet, ours: slice, cluster: Callable[[int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """``ours`` of the images, and the memory's centroids of all (P * K,), of every global batch that is left.

    Each epoch begins with a clustering, by ``cluster``.
    """
    settings, camids = state.settings, pids_and_camids(state.benchmark.train)[1]
    per_epoch = settings.train.iters_per_epoch
    while state.step < state.total_steps:
        epoch, done = divmod(state.step, per_epoch)
        if done == 0 or state.labels is None:
            cluster(epoch)
        assert state.labels is not None
        planned = cluster_batches(
            state.labels,
            camids,
            num_ids=settings.batch.num_ids,
            num_instances=settings.batch.num_instances,
            num_batches=per_epoch,
            seed=settings.seed,
            epoch=epoch,
        )
        targets = torch.from_numpy(memory_targets(state.labels, camids, settings.memory))
        left = planned[done:]
        for chosen, decoded in zip(left, load_ahead(images, [chosen[ours] for chosen in left]), strict=True):
            yield decoded, targets[chosen].to(state.world.device)


def build(settings: config.Unsupervised, chosen: Precision) -> tuple[ClusterContrast, dict[str, Any]]:
    """The module, and the preprocessing that belongs to its weights."""
    model_settings, weights = settings.model.model_dump(mode="json", exclude_none=True), None
    if settings.init != RANDOM:
        weights, record = read_start(settings.init)
        model_settings = settings_from(settings.init, record, model_settings, settings.model.model_fields_set)
    encoder = build_encoder(model_settings, drop_path_rate=settings.train.drop_path_rate)
    if weights is not None:
        portable.load_strictly(encoder, weights, settings.init)
    head = Neck(encoder, **head_options(settings), bn_group_size=settings.train.bn_group_size)
    module = ClusterContrast(ReIDModel(encoder, head), compute_dtype=chosen.dtype)
    return module, model_settings


def head_options(settings: config.Unsupervised) -> dict[str, Any]:
    """What the head pools, as a checkpoint keeps it."""
    if settings.feature.pool != "rows":
        return {"pool": settings.feature.pool}
    return {"pool": "rows", "columns": settings.feature.columns, "num_rows": settings.model.grid[0]}


def read_start(init: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The encoder of a fine-tuned run (for UDA) or of a pre-trained one (for USL), and the settings that belong to it.

    Raises:
        UserError: there is none, or ``init`` is a run directory whose training has not reached its end.
    """
    path = portable.locate(init)
    state = portable.read_state(path)
    portable.require_finished(init, path)
    if "head" not in state:
        return portable.read_encoder(path)
    weights = portable.read_kind(path, "model")
    return encoder_weights({name.removeprefix("model."): tensor for name, tensor in weights.items()}), state["model"]


def warn_of_same_data(settings: config.Unsupervised, benchmark: Benchmark) -> None:
    """Say so where the start was fine-tuned on the images that are now to be learned from without labels."""
    if settings.init == RANDOM:
        return
    source = portable.read_state(portable.locate(settings.init))
    if (source.get("benchmark"), source.get("root")) == (benchmark.name, str(Path(benchmark.root).resolve())):
        print(
            f"warning: {settings.init} was fine-tuned on {benchmark.name} at {benchmark.root} too and has seen these labels: "
            "what comes out is neither USL nor UDA"
        )


def build_engine(settings: config.Unsupervised, module: ClusterContrast) -> Engine:
    """The plain engine."""
    groups = optim.param_groups(module.named_parameters(), lr=settings.optim.lr, weight_decay=settings.optim.weight_decay)
    adamw = settings.optim.kind == "adamw"
    optimizer = optim.adamw(groups, settings.optim.betas) if adamw else optim.sgd(groups, settings.optim.momentum)
    return NativeEngine(module, optimizer, grad_accum_steps=1, max_norm=settings.optim.max_norm)


def lr_scale_at(settings: config.Unsupervised, step: int) -> float:
    """The step's share of the first learning rate: ``decay`` for each ``decay_every_epochs``, or half a cosine down to 0."""
    if settings.optim.schedule == "cosine":
        total = settings.train.epochs * settings.train.iters_per_epoch
        return optim.lr_scale_at(step, total, warmup_steps=0, min_ratio=0.0)
    epoch = step // settings.train.iters_per_epoch
    return settings.optim.decay ** (epoch // settings.optim.decay_every_epochs)


def save(state: UnsupervisedState, writer: Writer | None) -> None:
    """Have a checkpoint written. Here stands everything that a resumed run needs. Called by all ranks together."""
    dist.average_buffers(state.module)  # running statistics of what each rank has seen
    saved = state.engine.portable_state()
    if not writer or saved is None:
        return
    assert state.labels is not None
    clusters = {"labels": torch.from_numpy(state.labels), "centroids": state.module.memory.centroids}
    of_head = {"head": {"kind": "neck", **head_options(state.settings)}, "whiten": whitening_of(state.settings)}
    record = downstream.record_of(state, saved.num_updates, num_classes=0, **of_head)
    tensors = {"model": saved.params, **saved.moments, "clusters": clusters}
    writer.save(portable.Checkpoint(state.step, tensors, record))


def load(state: UnsupervisedState, saved: portable.Checkpoint) -> None:
    """Take over a checkpoint's tensors, and with them the clusters of its epoch."""
    downstream.load_engine(state.engine, saved, without=("clusters",))
    clusters = saved.tensors["clusters"]
    state.labels = clusters["labels"].numpy()
    camids = pids_and_camids(state.benchmark.train)[1]
    centroids = clusters["centroids"].to(state.world.device)
    state.module.memory = build_memory(centroids, state.labels, camids, state.settings.memory)


def log_setup(state: UnsupervisedState) -> None:
    """Record the run's set-up and print the sizes that follow from it."""
    downstream.log_setup(state, "unsupervised")
    warn_of_same_data(state.settings, state.benchmark)
