"""Supervised person re-identification on one benchmark: build, loop, save, evaluate the last epoch.

``personmae finetune CONFIG [a.b=c ...]`` and ``deepspeed launcher/finetune.py --config CONFIG [a.b=c ...]`` both end here.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from personmae import config, dist, downstream, optim
from personmae.checkpoint import portable
from personmae.checkpoint.writer import Writer
from personmae.config import RANDOM
from personmae.downstream import augmented
from personmae.engine.base import Engine
from personmae.engine.native import NativeEngine
from personmae.errors import UserError
from personmae.guard import Guard
from personmae.model.vit import build_encoder, share_drop_path
from personmae.monitor import run_log
from personmae.monitor.heartbeat import Phase
from personmae.monitor.rank_metrics import RankMetrics
from personmae.precision import Precision
from personmae.reid.datasets import Benchmark, pids_and_camids, train_labels
from personmae.reid.heads import Classifier, ReIDModel, build_head, layer_id, settings_from
from personmae.reid.losses import reid_loss
from personmae.reid.sampler import pk_batches
from personmae.reid.transforms import load_ahead
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
    resume_key: dict[str, Any]  # what must agree before the run is resumed
    precision: Precision
    step: int = 0

    @property
    def total_steps(self) -> int:
        return len(self.order)


def run(settings: config.Finetune) -> None:
    """Train all epochs, resuming what the run directory holds, then evaluate. Writes ``result.json``.

    Raises:
        UserError: the configuration, the weights or the benchmark cannot be used. Found before the first step.
        Stopped: a signal asked for it. The state is saved.
        Diverged: gradients are no longer finite.
    """
    parts = downstream.Parts("finetune", lambda *_: None, build_state, load, log_setup, train)
    downstream.run(settings, parts)


def build_state(settings: config.Finetune, world: dist.World, benchmark: Benchmark, chosen: Precision) -> FinetuneState:
    """The state of step 0."""
    order = np.concatenate(plan_batches(settings, benchmark))
    torch.manual_seed(settings.seed)
    module, model_settings = build(settings, int(train_labels(benchmark.train).max()) + 1, chosen)
    module.to(world.device).train()
    known = downstream.resume_key(settings, benchmark, chosen.name)
    engine = build_engine(settings, module)
    return FinetuneState(settings, world, benchmark, module, model_settings, engine, order, known, chosen)


def train(state: FinetuneState, found: Path | None, log: run_log.RunLog, metrics: RankMetrics, stop: dist.StopSignal) -> None:
    """The loop: from the state that was ``found``, or from the start, to the last step."""
    settings, world, engine, total_steps = state.settings, state.world, state.engine, state.total_steps
    labels = torch.from_numpy(train_labels(state.benchmark.train))
    guard = Guard(world.device, max_skipped_steps=settings.train.max_skipped_steps)
    ours, silent = dist.share(state.order.shape[1]), True  # the first step is shown at once
    share_drop_path(state.module, state.order.shape[1], ours)
    left = state.order[state.step :]
    working: Phase = "compile" if settings.train.compile else "step"  # what the next step is
    with (
        downstream.open_images(state, log) as images,
        closing(downstream.build_saver(state, found, save, guard, metrics, stop)) as saver,
    ):
        for chosen, decoded in zip(left, load_ahead(images, left[:, ours]), strict=True):
            metrics.beat(working, state.step)
            metrics.enter("inputs")
            batch = {"images": augmented(state, decoded, len(chosen), ours), "labels": labels[chosen[ours]].to(world.device)}
            metrics.enter("forward_backward")
            losses = engine.forward_backward(batch, last_micro=True)
            metrics.enter("optimizer")
            lr_scale = lr_scale_at(settings, state.step, total_steps)
            _, skipped = engine.step(lr_scale)
            guard.add(losses["loss"], skipped)
            state.step, working = state.step + 1, "step"

            metrics.count(state.step, len(chosen))
            log.advance(state.step)
            in_turn = state.step % settings.train.log_every == 0 or state.step == total_steps
            if silent or in_turn:
                stacked = dist.mean(torch.stack([value.float() for value in losses.values()]))
                values = dict(zip(losses, stacked.tolist(), strict=True)) | {"lr": lr_scale * settings.optim.lr}
                (log.record if in_turn else log.display)(state.step, values, images_per_step=len(chosen))
            if in_turn:
                guard.last_counted(state.step, settings.run_dir)  # ends a run whose gradients stay infinite
            silent = saver.at(state.step, silent=log.is_due())
            metrics.enter("data_wait")
        saver.end(state.step)


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
    model_settings, weights = settings.model.model_dump(mode="json", exclude_none=True), None
    if settings.init != RANDOM:
        path = portable.locate(settings.init)
        if "head" in portable.read_state(path):
            raise UserError(
                f"a pre-training checkpoint is required. {path} is of a model with a head: give init the run that it came "
                "from, or go on from it without labels by 'personmae unsupervised'"
            )
        weights, record = portable.read_encoder(settings.init)
        model_settings = settings_from(settings.init, record, model_settings, settings.model.model_fields_set)
    encoder = build_encoder(model_settings, drop_path_rate=settings.train.drop_path_rate)
    if weights is not None:
        portable.load_strictly(encoder, weights, settings.init)
    head = build_head(encoder, num_classes, **settings.head.model_dump(), bn_group_size=settings.train.bn_group_size)
    module = SupervisedReID(
        ReIDModel(encoder, head),
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


def save(state: FinetuneState, writer: Writer | None) -> None:
    """Have a checkpoint written. Here stands everything that a resumed run needs. Called by all ranks together."""
    dist.average_buffers(state.module)  # running statistics of what each rank has seen
    saved = state.engine.portable_state()
    if not writer or saved is None:
        return
    classes = num_classes(state.module.get_submodule("model.head"))
    record = downstream.record_of(state, saved.num_updates, num_classes=classes, head=state.settings.head.model_dump())
    writer.save(portable.Checkpoint(state.step, {"model": saved.params, **saved.moments}, record))


def num_classes(head: nn.Module) -> int:
    """Classes of a head's first classifier."""
    return next(p.shape[0] for name, p in head.named_parameters() if name.endswith("classifier.weight"))


def load(state: FinetuneState, saved: portable.Checkpoint) -> None:
    """Take over a checkpoint's tensors."""
    downstream.load_engine(state.engine, saved)


def log_setup(state: FinetuneState) -> None:
    """Record the run's set-up and print the sizes that follow from it."""
    downstream.log_setup(state, "finetune", f" with {state.settings.head.kind} head")
