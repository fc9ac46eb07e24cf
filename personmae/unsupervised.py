"""ReID without labels: clusters of the images' features are their classes, found anew before every epoch (arXiv 2103.11568).

From a pre-trained encoder this is unsupervised learning (USL); from one fine-tuned on another benchmark it is unsupervised
domain adaptation (UDA), which uses no source image. True identities are read for the log alone.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personmae import batch_plan, config, dist, optim, precision
from personmae.checkpoint import portable, resume_point, run_lock, start_anew
from personmae.checkpoint.writer import Schedule, Writer, finish
from personmae.clustering import build_memory, find_clusters, memory_targets, require_cameras, trim_clusters
from personmae.config import RANDOM
from personmae.downstream import (
    augmented,
    evaluate,
    identity,
    is_complete,
    keep_precision,
    record_run,
    require_same,
    tell_complete,
    tell_end,
    whitening_of,
)
from personmae.engine.base import Engine, PortableState
from personmae.engine.native import NativeEngine
from personmae.errors import Stopped
from personmae.guard import Guard
from personmae.model.vit import SIZES, VisionTransformer, share_drop_path
from personmae.monitor import run_log
from personmae.monitor.rank_metrics import RankMetrics
from personmae.precision import Precision
from personmae.reid.datasets import Benchmark, load_benchmark, pids_and_camids
from personmae.reid.features import timed
from personmae.reid.heads import Neck, ReIDModel, describe_start, encoder_weights, settings_from, trained_size
from personmae.reid.memory import ClusterMemory
from personmae.reid.sampler import cluster_batches
from personmae.reid.transforms import ImageSet, load_ahead


@dataclass
class UnsupervisedState:
    """What a run is made of, and how far it has come; ``labels`` are the clusters of the epoch that ``step`` is in."""

    settings: config.Unsupervised
    world: dist.World
    benchmark: Benchmark
    module: "ClusterContrast"
    model_settings: dict[str, Any]  # architecture and preprocessing, which travel with the weights
    engine: Engine
    identity: dict[str, Any]  # what must agree before the run is resumed
    precision: Precision
    step: int = 0
    labels: np.ndarray | None = None

    @property
    def total_steps(self) -> int:
        return self.settings.train.epochs * self.settings.train.iters_per_epoch


def run(settings: config.Unsupervised) -> None:
    """Train all epochs, resuming what the run directory holds, then evaluate; writes ``result.json``.

    Raises:
        UserError: the configuration, the weights or the benchmark cannot be used, or there are too few clusters.
        Stopped: a signal asked for it; the state is saved.
        Diverged: gradients are no longer finite.
    """
    began, world = time.monotonic(), dist.read_world()
    metrics = RankMetrics("unsupervised", **settings.metrics.rank_metrics_arguments())
    batch_plan.require_equal_parts(
        settings.batch.num_ids * settings.batch.num_instances, settings.train.bn_group_size, world.world_size
    )
    benchmark = load_benchmark(settings.benchmark, settings.root, train_on_val=settings.train_on_val)
    require_cameras(settings, benchmark)
    if start_anew.may_be_complete(settings.run_dir, settings.checkpoint.resume) and is_complete(settings, benchmark):
        if world.is_first:
            tell_complete(settings)
        metrics.complete()
        metrics.close()
        return
    stop = dist.StopSignal()
    dist.start(world)

    chosen = precision.choose(settings.train.precision, str(world.device), share=dist.from_first_rank)
    torch.manual_seed(settings.seed)
    module, model_settings = build(settings, chosen)
    module.to(world.device).train()
    engine = build_engine(settings, module)
    known = identity(settings, benchmark, chosen.name)
    state = UnsupervisedState(settings, world, benchmark, module, model_settings, engine, known, chosen)
    held = run_lock.lock(settings.run_dir) if world.is_first else None  # before anything there is renamed or fetched
    try:
        with metrics.restoring():
            found = resume(state) if start_anew.goes_on(settings.run_dir, **settings.checkpoint.start_arguments()) else None
        if world.is_first:
            announce(state)
        log = run_log.RunLog(
            settings.run_dir,
            is_first=world.is_first,
            title="unsupervised",
            total_steps=state.total_steps,
            first_step=state.step,
            numbers=metrics.run,
        )
        with contextlib.closing(log):
            train(state, found, log, metrics, stop)
            state.engine.close()
            evaluate(state, log, metrics, stop)
        metrics.complete(settings.run_dir, settings.checkpoint.upload_to)
        if world.is_first:
            tell_end(settings, "unsupervised", time.monotonic() - began)
    finally:
        dist.stop()
        if held:
            held.close()
        metrics.close(lambda: stop.requested)


def train(
    state: UnsupervisedState, found: Path | None, log: run_log.RunLog, metrics: RankMetrics, stop: dist.StopSignal
) -> None:
    """The loop: from the state that was ``found``, or from the start, to the last step."""
    settings, world, engine, total_steps = state.settings, state.world, state.engine, state.total_steps
    pool = ThreadPoolExecutor(dist.threads_per_rank(world))
    paths = [sample.path for sample in state.benchmark.train]
    with timed(log.log, f"opening {len(paths):,} images"):
        images = ImageSet(paths, settings.model.img_size, pool=pool)
    if world.is_first:
        trim_clusters(Path(settings.run_dir), state.step)
    writer = Writer(settings.run_dir, resumed=found, **settings.checkpoint.writer_arguments()) if world.is_first else None
    if writer:
        metrics.read_writer(writer.counters.registry)
    if metrics.run:
        metrics.run.plan(
            first_step=state.step,
            total_steps=total_steps,
            world_size=world.world_size,
            checkpoint_steps=settings.checkpoint.every_steps,
        )
    schedule = Schedule(**settings.checkpoint.schedule_arguments())
    guard = Guard(world.device, max_skipped_steps=settings.train.max_skipped_steps)
    size = settings.batch.num_ids * settings.batch.num_instances
    ours, saved, due, shown = dist.share(size), state.step, False, True  # the first step is shown at once
    share_drop_path(state.module, size, ours)

    def clustering_stopped() -> bool:
        metrics.beat("evaluate", state.step)
        return stop.requested

    try:
        for decoded, labels in batches(state, images, ours, log, clustering_stopped):
            metrics.beat("step", state.step)
            metrics.enter("inputs")
            batch = {"images": augmented(state, decoded, size, ours), "labels": labels[ours]}
            metrics.enter("forward_backward")
            outputs = engine.forward_backward(batch, last_micro=True)
            metrics.enter("optimizer")
            lr_scale = lr_scale_at(settings, state.step)
            _, skipped = engine.step(lr_scale)
            guard.note(outputs["loss"], skipped)
            # By the global batch in its order, so that the memory is the same for any number of ranks.
            state.module.memory.update(dist.gather_rows(outputs["features"], size), labels, skipped)
            state.step += 1

            metrics.count(state.step, size)
            log.advance(state.step)
            logged = state.step % settings.train.log_every == 0 or state.step == total_steps
            if shown or logged:
                values = {"loss": dist.mean(outputs["loss"]).item(), "lr": lr_scale * settings.optim.lr}
                (log.record if logged else log.display)(state.step, values, images_per_step=size)
            by_clock = writer is not None and not writer.busy and schedule.by_time(writer.seconds_since_save)
            stopping, by_clock, shown = dist.any_ranks(stop.requested, by_clock, log.is_due())
            due |= by_clock or schedule.by_step(state.step)
            counted = (due or logged) and guard.last_counted(state.step, settings.run_dir)
            if state.step == total_steps or (due and counted):
                metrics.beat("checkpoint", state.step)
                save(state, writer)
                saved, due = state.step, False
            if stopping and state.step < total_steps:
                raise Stopped("in training")
            metrics.enter("data_wait")
        finish(writer)
    except Stopped as early:  # here or in a clustering
        stop.settle()
        metrics.beat("checkpoint", state.step)
        if state.step > saved:
            save(state, writer)
        finish(writer)
        kept = f"state saved in {settings.run_dir}" if state.step else "nothing to save yet"
        raise Stopped(f"{early}, at step {state.step} of {total_steps}, {kept}; run this again to go on") from None
    finally:
        pool.shutdown(cancel_futures=True)
        if writer:
            writer.close()  # last: it may raise


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
    state: UnsupervisedState, images: ImageSet, ours: slice, log: run_log.RunLog, stopped: Callable[[], bool]
) -> Iterator[tuple[Tensor, Tensor]]:
    """``ours`` of the images, and the memory's centroids of all (P * K,), of every global batch that is left.

    Each epoch begins with a clustering.
    """
    settings, camids = state.settings, pids_and_camids(state.benchmark.train)[1]
    per_epoch = settings.train.iters_per_epoch
    while state.step < state.total_steps:
        epoch, done = divmod(state.step, per_epoch)
        if done == 0 or state.labels is None:
            find_clusters(state, images, epoch, log, stopped)
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
    model_settings = settings.model.model_dump(mode="json")
    encoder = VisionTransformer(
        **SIZES[settings.model.size],
        patch_size=settings.model.patch_size,
        drop_path_rate=settings.train.drop_path_rate,
    )
    if settings.init != RANDOM:
        weights, record = read_start(settings.init)
        model_settings = settings_from(settings.init, record, model_settings, settings.model.model_fields_set)
        portable.load_strictly(encoder, weights, settings.init)
    head = Neck(encoder, **head_options(settings), bn_group_size=settings.train.bn_group_size)
    model = ReIDModel(encoder, head, trained_size=trained_size(model_settings))
    module = ClusterContrast(model, compute_dtype=chosen.dtype)
    return module, model_settings


def head_options(settings: config.Unsupervised) -> dict[str, Any]:
    """What the head pools, as a checkpoint keeps it."""
    if settings.feature.pool != "rows":
        return {"pool": settings.feature.pool}
    num_rows = settings.model.img_size[0] // settings.model.patch_size
    return {"pool": "rows", "columns": settings.feature.columns, "num_rows": num_rows}


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
    """Have a checkpoint written; here stands everything that a resumed run needs. Called by all ranks together."""
    dist.average_buffers(state.module)  # running statistics of what each rank has seen
    saved = state.engine.portable_state()
    if not writer or saved is None:
        return
    assert state.labels is not None
    clusters = {"labels": torch.from_numpy(state.labels), "centroids": state.module.memory.centroids}
    record = {
        "total_steps": state.total_steps,
        "num_updates": saved.num_updates,
        "num_classes": 0,
        "init": state.settings.init,
        "head": {"kind": "neck", **head_options(state.settings)},
        "whiten": whitening_of(state.settings),
        "model": state.model_settings,
        "benchmark": state.benchmark.name,
        "root": str(Path(state.benchmark.root).resolve()),
        "identity": state.identity,
        **state.precision.record(),
        "versions": portable.versions(),
    }
    tensors = {"model": saved.params, **saved.moments, "clusters": clusters}
    writer.save(portable.Checkpoint(state.step, tensors, record))


def resume(state: UnsupervisedState) -> Path | None:
    """Take over the newest valid checkpoint of the run, if there is one; returns where it lies."""
    found = resume_point.newest_for_all(state.settings.run_dir, **state.settings.checkpoint.resume_arguments())
    if not found:
        return None
    saved = found.read()
    keep_precision(state, saved.state.get("identity", {}))
    require_same(found.path, state.settings, state.identity, saved.state.get("identity", {}))
    tensors = dict(saved.tensors)
    clusters = tensors.pop("clusters")
    state.engine.load_portable(PortableState(tensors.pop("model"), tensors, saved.state["num_updates"]))
    state.step, state.labels = saved.step, clusters["labels"].numpy()
    camids = pids_and_camids(state.benchmark.train)[1]
    centroids = clusters["centroids"].to(state.world.device)
    state.module.memory = build_memory(centroids, state.labels, camids, state.settings.memory)
    found.tell(state.step, state.total_steps)
    return found.path


def announce(state: UnsupervisedState) -> None:
    """Record the run's set-up and print the sizes that follow from it."""
    settings, total_steps = state.settings, state.total_steps
    record_run(state)
    print(f"unsupervised: {state.precision}")
    warn_of_same_data(settings, state.benchmark)
    if settings.init != RANDOM and not state.step:
        print(f"unsupervised: {describe_start(state.module.model, settings.init, settings.model.img_size)}")
    millions = sum(p.numel() for p in state.module.parameters()) / 1e6
    going = f"resuming at step {state.step} of {total_steps}" if state.step else f"{total_steps} steps"
    print(
        f"unsupervised: {settings.model.size} ({millions:.1f} M parameters) from {settings.init}, {going}, "
        f"peak lr {settings.optim.lr:.3g}, run {settings.run_dir}",
        flush=True,
    )
