"""Supervised person re-identification on one benchmark: build, loop, save, evaluate the last epoch.

``personmae finetune CONFIG [a.b=c ...]`` and ``deepspeed launcher/finetune.py --config CONFIG [a.b=c ...]`` both end here.
"""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from personmae import batch_plan, config, dist, optim, precision
from personmae.checkpoint import portable, resume_point, run_lock, start_anew
from personmae.checkpoint.writer import Schedule, Writer, finish
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
)
from personmae.engine.base import Engine, PortableState
from personmae.engine.native import NativeEngine
from personmae.errors import Stopped, UserError
from personmae.guard import Guard
from personmae.model.vit import SIZES, VisionTransformer, share_drop_path
from personmae.monitor import run_log
from personmae.monitor.heartbeat import Phase
from personmae.monitor.rank_metrics import RankMetrics
from personmae.precision import Precision
from personmae.reid.datasets import Benchmark, load_benchmark, pids_and_camids, train_labels
from personmae.reid.features import timed
from personmae.reid.heads import (
    Classifier,
    ReIDModel,
    build_head,
    describe_start,
    layer_id,
    settings_from,
    trained_size,
)
from personmae.reid.losses import reid_loss
from personmae.reid.sampler import pk_batches
from personmae.reid.transforms import ImageSet, load_ahead
from personmae.system import compile_cache


@dataclass
class FinetuneState:
    """What a run is made of, and how far it has come."""

    settings: config.Finetune
    world: dist.World
    benchmark: Benchmark
    module: "SupervisedReID"
    model_settings: dict[str, Any]  # architecture and preprocessing, which travel with the weights
    engine: Engine
    order: np.ndarray  # (total_steps, P * K): the images of every global batch
    identity: dict[str, Any]  # what must agree before the run is resumed
    precision: Precision
    step: int = 0

    @property
    def total_steps(self) -> int:
        return len(self.order)

    def is_due(self, step: int) -> bool:
        """Whether a step is one that is logged."""
        return step % self.settings.train.log_every == 0 or step == self.total_steps


def run(settings: config.Finetune) -> None:
    """Train all epochs, resuming what the run directory holds, then evaluate; writes ``result.json``.

    Raises:
        UserError: the configuration, the weights or the benchmark cannot be used; found before the first step.
        Stopped: a signal asked for it; the state is saved.
        Diverged: gradients are no longer finite.
    """
    began, world = time.monotonic(), dist.read_world()
    metrics = RankMetrics("finetune", **settings.metrics.rank_metrics_arguments())
    batch_plan.require_equal_parts(
        settings.batch.num_ids * settings.batch.num_instances, settings.train.bn_group_size, world.world_size
    )
    benchmark = load_benchmark(settings.benchmark, settings.root, train_on_val=settings.train_on_val)
    if start_anew.may_be_complete(settings.run_dir, settings.checkpoint.resume) and is_complete(settings, benchmark):
        if world.is_first:
            tell_complete(settings)
        metrics.complete()
        metrics.close()
        return
    stop = dist.StopSignal()
    dist.start(world)
    order = np.concatenate(plan_batches(settings, benchmark))

    chosen = precision.choose(settings.train.precision, str(world.device), share=dist.from_first_rank)
    torch.manual_seed(settings.seed)
    module, model_settings = build(settings, int(train_labels(benchmark.train).max()) + 1, chosen)
    module.to(world.device).train()
    engine = build_engine(settings, module)
    known = identity(settings, benchmark, chosen.name)
    state = FinetuneState(settings, world, benchmark, module, model_settings, engine, order, known, chosen)
    held = run_lock.lock(settings.run_dir) if world.is_first else None  # before anything there is renamed or fetched
    try:
        with metrics.restoring():
            found = resume(state) if start_anew.goes_on(settings.run_dir, **settings.checkpoint.start_arguments()) else None
        if world.is_first:
            announce(state)
        log = run_log.RunLog(
            settings.run_dir,
            is_first=world.is_first,
            title="finetune",
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
            tell_end(settings, "finetune", time.monotonic() - began)
    finally:
        dist.stop()
        if held:
            held.close()
        metrics.close(lambda: stop.requested)


def train(state: FinetuneState, found: Path | None, log: run_log.RunLog, metrics: RankMetrics, stop: dist.StopSignal) -> None:
    """The loop: from the state that was ``found``, or from the start, to the last step."""
    settings, world, engine, total_steps = state.settings, state.world, state.engine, state.total_steps
    labels = torch.from_numpy(train_labels(state.benchmark.train))
    pool = ThreadPoolExecutor(dist.threads_per_rank(world))
    paths = [sample.path for sample in state.benchmark.train]
    with timed(log.log, f"opening {len(paths):,} images"):
        images = ImageSet(paths, settings.model.img_size, pool=pool)
    writer = open_writer(settings, found) if world.is_first else None
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
    ours, due, shown = dist.share(state.order.shape[1]), False, True  # the first step is shown at once
    share_drop_path(state.module, state.order.shape[1], ours)
    left = state.order[state.step :]
    working: Phase = "compile" if settings.train.compile else "step"  # what the next step is
    try:
        for chosen, decoded in zip(left, load_ahead(images, left[:, ours]), strict=True):
            metrics.beat(working, state.step)
            metrics.enter("inputs")
            batch = {"images": augmented(state, decoded, len(chosen), ours), "labels": labels[chosen[ours]].to(world.device)}
            metrics.enter("forward_backward")
            losses = engine.forward_backward(batch, last_micro=True)
            metrics.enter("optimizer")
            lr_scale = lr_scale_at(settings, state.step, total_steps)
            _, skipped = engine.step(lr_scale)
            guard.note(losses["loss"], skipped)
            state.step, working = state.step + 1, "step"

            metrics.count(state.step, len(chosen))
            log.advance(state.step)
            if shown or state.is_due(state.step):
                stacked = dist.mean(torch.stack([value.float() for value in losses.values()]))
                values = dict(zip(losses, stacked.tolist(), strict=True)) | {"lr": lr_scale * settings.optim.lr}
                record = log.record if state.is_due(state.step) else log.display
                record(state.step, values, images_per_step=len(chosen))
            by_clock = writer is not None and not writer.busy and schedule.by_time(writer.seconds_since_save)
            stopping, by_clock, shown = dist.any_ranks(stop.requested, by_clock, log.is_due())
            due |= by_clock or schedule.by_step(state.step)
            counted = (due or state.is_due(state.step)) and guard.last_counted(state.step, settings.run_dir)
            if stopping or state.step == total_steps or (due and counted):
                metrics.beat("checkpoint", state.step)
                save(state, writer)
                due = False
            if stopping and state.step < total_steps:
                stop.settle()
                finish(writer)
                raise Stopped(
                    f"at step {state.step} of {total_steps}, state saved in {settings.run_dir}; run this again to go on"
                )
            metrics.enter("data_wait")
        finish(writer)
    finally:
        pool.shutdown(cancel_futures=True)
        if writer:
            writer.close()  # last: it may raise


class SupervisedReID(nn.Module):
    """A ReID model and its loss: ``forward`` takes ``images`` (B, 3, H, W), normalised, and ``labels`` (B,)."""

    def __init__(
        self, model: ReIDModel, *, label_smoothing: float, compute_dtype: torch.dtype, classifier: Classifier = "linear"
    ):
        super().__init__()
        self.model, self.label_smoothing, self.compute_dtype = model, label_smoothing, compute_dtype
        self.classifier: Classifier = classifier

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = batch["images"]
        with torch.autocast(images.device.type, self.compute_dtype, self.compute_dtype != torch.float32):
            outputs = self.model(images)
        # The triplet loss searches the global batch: 24 instead of 63 mAP are on record where each GPU searched its own part.
        widths = [embedding.shape[1] for embedding in outputs["embeddings"]]
        gathered = dist.gather_with_grad(torch.cat([embedding.float() for embedding in outputs["embeddings"]], dim=1))
        everyone = dist.gather_with_grad(batch["labels"])
        outputs["embeddings"] = list(gathered.split(widths, dim=1))
        return reid_loss(outputs, batch["labels"], everyone, smoothing=self.label_smoothing, classifier=self.classifier)


def build(settings: config.Finetune, num_classes: int, chosen: Precision) -> tuple[SupervisedReID, dict[str, Any]]:
    """The module, from random or pre-trained weights, and the preprocessing that belongs to those weights."""
    model_settings = settings.model.model_dump(mode="json")
    encoder = VisionTransformer(
        **SIZES[settings.model.size],
        patch_size=settings.model.patch_size,
        drop_path_rate=settings.train.drop_path_rate,
    )
    if settings.init != RANDOM:
        path = portable.locate(settings.init)
        if "head" in portable.read_state(path):
            raise UserError(
                f"a pre-training checkpoint is required; {path} is of a model with a head: give init the run that it came "
                "from, or go on from it without labels by 'personmae unsupervised'"
            )
        weights, record = portable.read_encoder(settings.init)
        model_settings = settings_from(settings.init, record, model_settings, settings.model.model_fields_set)
        portable.load_strictly(encoder, weights, settings.init)
    head = build_head(encoder, num_classes, **settings.head.model_dump(), bn_group_size=settings.train.bn_group_size)
    module = SupervisedReID(
        ReIDModel(encoder, head, trained_size=trained_size(model_settings)),
        label_smoothing=settings.train.label_smoothing,
        compute_dtype=chosen.dtype,
        classifier=settings.head.classifier,
    )
    if settings.train.compile:
        compile_cache.mend()
        module.model.compile()
    return module, model_settings


def build_engine(settings: config.Finetune, module: SupervisedReID) -> Engine:
    """The plain engine with layer-wise learning rates: lr * layer_decay^(depth + 1 - layer)."""
    depth = module.model.depth
    groups = optim.param_groups(
        module.named_parameters(),
        lr=settings.optim.lr,
        weight_decay=settings.optim.weight_decay,
        layer_id=lambda name: layer_id(name.removeprefix("model."), depth),
        num_layers=depth + 1,
        layer_decay=settings.optim.layer_decay,
    )
    if settings.optim.kind == "sgd":
        optimizer = optim.sgd(groups, settings.optim.momentum)
    else:
        optimizer = optim.adamw(groups, settings.optim.betas)
    return NativeEngine(module, optimizer, grad_accum_steps=1, max_norm=settings.optim.max_norm)


def plan_batches(settings: config.Finetune, benchmark: Benchmark) -> list[np.ndarray]:
    """The P x K batches of every epoch: (steps, P * K) indices each."""
    pids, _ = pids_and_camids(benchmark.train)
    return [
        pk_batches(
            pids,
            num_ids=settings.batch.num_ids,
            num_instances=settings.batch.num_instances,
            seed=settings.seed,
            epoch=epoch,
        )
        for epoch in range(settings.train.epochs)
    ]


def lr_scale_at(settings: config.Finetune, step: int, total_steps: int) -> float:
    """The step's share of the peak learning rate."""
    return optim.lr_scale_at(
        step,
        total_steps,
        warmup_steps=round(settings.optim.warmup_fraction * total_steps),
        min_ratio=min(1.0, settings.optim.min_lr / settings.optim.lr),
    )


def open_writer(settings: config.Finetune, resumed: Path | None) -> Writer:
    """What saves the run's states beside the loop."""
    return Writer(settings.run_dir, resumed=resumed, **settings.checkpoint.writer_arguments())


def save(state: FinetuneState, writer: Writer | None) -> None:
    """Have a checkpoint written; here stands everything that a resumed run needs. Called by all ranks together."""
    dist.average_buffers(state.module)  # running statistics of what each rank has seen
    saved = state.engine.portable_state()
    if not writer or saved is None:
        return
    head = state.module.get_submodule("model.head")
    record = {
        "total_steps": state.total_steps,
        "num_updates": saved.num_updates,
        "num_classes": num_classes(head),
        "init": state.settings.init,
        "head": state.settings.head.model_dump(),
        "model": state.model_settings,
        "benchmark": state.benchmark.name,
        "root": str(Path(state.benchmark.root).resolve()),
        "identity": state.identity,
        **state.precision.record(),
        "versions": portable.versions(),
    }
    writer.save(portable.Checkpoint(state.step, {"model": saved.params, **saved.moments}, record))


def num_classes(head: nn.Module) -> int:
    """Classes of a head's first classifier."""
    return next(p.shape[0] for name, p in head.named_parameters() if name.endswith("classifier.weight"))


def resume(state: FinetuneState) -> Path | None:
    """Take over the newest valid checkpoint of the run, if there is one; returns where it lies."""
    found = resume_point.newest_for_all(state.settings.run_dir, **state.settings.checkpoint.resume_arguments())
    if not found:
        return None
    saved = found.read()
    keep_precision(state, saved.state.get("identity", {}))
    require_same(found.path, state.settings, state.identity, saved.state.get("identity", {}))
    tensors = dict(saved.tensors)
    state.engine.load_portable(PortableState(tensors.pop("model"), tensors, saved.state["num_updates"]))
    state.step = saved.step
    found.tell(state.step, state.total_steps)
    return found.path


def announce(state: FinetuneState) -> None:
    """Record the run's set-up and print the sizes that follow from it."""
    settings, total_steps = state.settings, state.total_steps
    record_run(state)
    print(f"finetune: {state.precision}")
    if settings.init != RANDOM and not state.step:
        print(f"finetune: {describe_start(state.module.model, settings.init, settings.model.img_size)}")
    millions = sum(p.numel() for p in state.module.parameters()) / 1e6
    going = f"resuming at step {state.step} of {total_steps}" if state.step else f"{total_steps} steps"
    print(
        f"finetune: {settings.model.size} with {settings.head.kind} head ({millions:.1f} M parameters) from {settings.init}, "
        f"{going}, peak lr {settings.optim.lr:.3g}, run {settings.run_dir}",
        flush=True,
    )
