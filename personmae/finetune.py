"""Supervised person re-identification on one benchmark: build, loop, save, evaluate the last epoch.

``personmae finetune CONFIG [a.b=c ...]`` and ``deepspeed launcher/finetune.py --config CONFIG [a.b=c ...]`` both end here.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from personmae import archive, checkpoint, config, dist, metrics, optim
from personmae.engine.base import Engine, PortableState
from personmae.engine.native import NativeEngine
from personmae.errors import Diverged, Stopped, UserError
from personmae.keeper import Schedule, Writer
from personmae.model.vit import SIZES, VisionTransformer
from personmae.reid import retrieval
from personmae.reid.datasets import Benchmark, describe, load_benchmark, pids_and_camids, train_labels
from personmae.reid.heads import ReIDModel, build_head, layer_id
from personmae.reid.losses import reid_loss
from personmae.reid.sampler import pk_batches
from personmae.reid.transforms import ImageSet, augment

RANDOM = "random"


def run(settings: config.Finetune) -> None:
    """Train all epochs, resuming what the run directory holds, then evaluate; writes ``result.json``.

    Raises:
        UserError: the configuration, the weights or the benchmark cannot be used; found before the first step.
        Stopped: a signal asked for it; the state is saved.
    """
    world = dist.read_world()
    if settings.batch.num_ids % world.world_size:
        raise UserError(f"batch.num_ids={settings.batch.num_ids} must be a multiple of the world size {world.world_size}")
    if settings.checkpoint.resume == "auto" and is_complete(settings):
        if world.is_first:
            print(f"{settings.run_dir} is complete", flush=True)
        return
    stop = dist.StopSignal()
    dist.start(world)
    benchmark = load_benchmark(settings.benchmark, settings.root)
    batches = plan_batches(settings, benchmark)
    total_steps = sum(map(len, batches))

    torch.manual_seed(settings.seed)
    module, model_settings = build(settings, num_classes=int(train_labels(benchmark.train).max()) + 1)
    module.to(world.device).train()
    engine = build_engine(settings, module)
    found = resume(settings, engine) if settings.checkpoint.resume == "auto" else None
    start = checkpoint.step_of(found.name) or 0 if found else 0
    labels = torch.from_numpy(train_labels(benchmark.train))
    num_threads = max(1, dist.usable_cores() // world.local_world_size)
    pool = ThreadPoolExecutor(num_threads)
    images = ImageSet([sample.path for sample in benchmark.train], settings.model.img_size, pool=pool)
    held = checkpoint.lock(settings.run_dir) if world.is_first else None
    writer = open_writer(settings, found) if world.is_first else None
    wanted = settings.checkpoint
    schedule = Schedule(wanted.every_steps, wanted.every_seconds, wanted.keep_every)
    if world.is_first:
        announce(settings, benchmark, module, total_steps, start)
    log = metrics.RunLog(settings.run_dir, is_first=world.is_first, title="finetune", total_steps=total_steps, first_step=start)
    order = np.concatenate(batches)  # (total_steps, P * K)
    share = order.shape[1] // world.world_size
    step, finite = start, torch.tensor(True, device=world.device)
    try:
        while step < total_steps:
            generator = seed_step(settings.seed, step, world.rank)
            chosen = order[step, world.rank * share : (world.rank + 1) * share]
            pictures = augment(
                images.load(chosen),
                generator,
                mean=model_settings["mean"],
                std=model_settings["std"],
                pad=settings.augment.pad,
                flip_prob=settings.augment.flip_prob,
                erase_prob=settings.augment.erase_prob,
            )
            batch = {"images": pictures.to(world.device), "labels": labels[chosen].to(world.device)}
            losses = engine.forward_backward(batch, last_micro=True)
            lr_scale = lr_scale_at(settings, step, total_steps)
            engine.step(lr_scale)
            step += 1

            finite &= losses["loss"].isfinite()
            log.advance(step)
            if step % settings.train.log_every == 0 or step == total_steps:
                stacked = dist.mean(torch.stack([value.float() for value in losses.values()]))
                values = dict(zip(losses, stacked.tolist(), strict=True)) | {"lr": lr_scale * settings.optim.lr}
                log.log(step, values, images_per_step=order.shape[1])
            timed = writer is not None and not writer.busy and schedule.by_time(writer.seconds_since_save)
            stopping, timed = dist.any_ranks(stop.requested, timed)
            if stopping or timed or schedule.by_step(step) or step == total_steps:
                if engine.any(not finite):
                    raise Diverged(f"the loss is not finite by step {step}; {settings.run_dir} keeps an earlier state")
                if writer:
                    save(settings, writer, engine, step, total_steps, model_settings)
            if stopping and step < total_steps:
                finish(writer)
                raise Stopped(f"at step {step} of {total_steps}, state saved in {settings.run_dir}; run this again to go on")
        finish(writer)
        engine.close()
        dist.stop()  # the other ranks need not wait for the evaluation
        if world.is_first:
            evaluate(settings, benchmark, module, model_settings, world.device, log)
    finally:
        pool.shutdown(cancel_futures=True)
        log.close()
        dist.stop()
        if writer:
            writer.close()  # last: it may raise
        if held:
            held.close()


class SupervisedReID(nn.Module):
    """A ReID model and its loss: ``forward`` takes ``images`` (B, 3, H, W), normalised, and ``labels`` (B,)."""

    def __init__(self, model: ReIDModel, *, label_smoothing: float, compute_dtype: torch.dtype):
        super().__init__()
        self.model, self.label_smoothing, self.compute_dtype = model, label_smoothing, compute_dtype

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = batch["images"]
        with torch.autocast(images.device.type, self.compute_dtype, self.compute_dtype != torch.float32):
            outputs = self.model(images)
        return reid_loss(outputs, batch["labels"], smoothing=self.label_smoothing)


def build(settings: config.Finetune, num_classes: int) -> tuple[SupervisedReID, dict[str, Any]]:
    """The module, from random or pre-trained weights, and the preprocessing that belongs to those weights."""
    model_settings = settings.model.model_dump(mode="json")
    encoder = VisionTransformer(
        **SIZES[settings.model.size],
        patch_size=settings.model.patch_size,
        drop_path_rate=settings.train.drop_path_rate,
    )
    if settings.init != RANDOM:
        weights, record = checkpoint.read_encoder(settings.init)
        for key in ("size", "patch_size"):
            if record[key] != model_settings[key]:
                raise UserError(
                    f"model.{key}={model_settings[key]} must be that of {settings.init}, which is {record[key]}; "
                    f"give model.{key}={record[key]}"
                )
        checkpoint.load_strictly(encoder, weights, settings.init)
        model_settings |= {"mean": record["mean"], "std": record["std"]}
    head = build_head(encoder, num_classes, **settings.head.model_dump())
    dtype = torch.bfloat16 if settings.train.precision == "bf16" else torch.float32
    module = SupervisedReID(ReIDModel(encoder, head), label_smoothing=settings.train.label_smoothing, compute_dtype=dtype)
    if settings.train.compile:
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


def seed_step(seed: int, step: int, rank: int) -> torch.Generator:
    """Seed drop path and augmentation from the step, so a resumed run draws what it would have drawn."""
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(number)
    return torch.Generator().manual_seed(number)


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
    wanted = settings.checkpoint
    return Writer(
        settings.run_dir,
        keep_last=wanted.keep_last,
        keep_every=wanted.keep_every,
        store=wanted.store,
        resumed=resumed,
        retry_seconds=wanted.retry_seconds,
        close_seconds=wanted.close_seconds,
    )


def finish(writer: Writer | None) -> None:
    """Wait on all ranks until the first has everything written and uploaded: a launcher ends it when another one ends."""
    if writer:
        writer.close()
    dist.barrier()


def save(
    settings: config.Finetune, writer: Writer, engine: Engine, step: int, total_steps: int, model_settings: dict[str, Any]
) -> None:
    """Have a checkpoint written; here stands everything that a resumed run needs."""
    state = engine.portable_state()
    assert state  # the native engine gives it to the first rank, which is the one that saves
    tensors = {"model": state.params, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    head = engine.module.get_submodule("model.head")
    record = {
        "total_steps": total_steps,
        "num_updates": state.num_updates,
        "num_classes": num_classes(head),
        "init": settings.init,
        "head": settings.head.model_dump(),
        "model": model_settings,
        "run_hash": run_hash(settings),
        "versions": checkpoint.versions(),
    }
    writer.save(checkpoint.Checkpoint(step, tensors, record))


def run_hash(settings: config.Finetune) -> str:
    """Digest of the configuration and of the weights that the run starts from."""
    weights = "" if settings.init == RANDOM else checkpoint.digest(checkpoint.locate(settings.init))
    return config.config_hash(settings) + weights


def is_complete(settings: config.Finetune) -> bool:
    """Whether the run has its result.

    Raises:
        UserError: it has one, but of another configuration or encoder.
    """
    result_file = Path(settings.run_dir) / "result.json"
    if not result_file.is_file():
        return False
    if json.loads(result_file.read_text()).get("run_hash") != run_hash(settings):
        raise UserError(
            f"{result_file} comes from another configuration or another encoder; delete {settings.run_dir}, use another "
            "run_dir, or give checkpoint.resume=none"
        )
    return True


def num_classes(head: nn.Module) -> int:
    """Classes of a head's first classifier."""
    return next(p.shape[0] for name, p in head.named_parameters() if name.endswith("classifier.weight"))


def resume(settings: config.Finetune, engine: Engine) -> Path | None:
    """Take over the newest valid checkpoint of the run, if there is one; returns where it lies."""
    found = archive.newest_for_all(settings.run_dir, settings.checkpoint.store)
    if not found:
        return None
    saved = checkpoint.read(found)
    if saved.state.get("run_hash") != run_hash(settings):
        raise UserError(
            f"{found} was trained with another configuration; use the same, another run_dir, or checkpoint.resume=none"
        )
    checkpoint.load_strictly(engine.module, saved.tensors["model"], found)
    engine.load_portable(
        PortableState(saved.tensors["model"], saved.tensors["exp_avg"], saved.tensors["exp_avg_sq"], saved.state["num_updates"])
    )
    return found


def announce(settings: config.Finetune, benchmark: Benchmark, module: SupervisedReID, total_steps: int, start: int) -> None:
    """Record the run's set-up and print the sizes that follow from it."""
    metrics.record_run(
        settings.run_dir,
        config_yaml=config.dump_yaml(settings),
        config_hash=config.config_hash(settings),
        seed=settings.seed,
        versions=checkpoint.versions(),
    )
    described = describe(benchmark)
    print(described.table, described.note, sep="\n")
    millions = sum(p.numel() for p in module.parameters()) / 1e6
    going = f"resuming at step {start} of {total_steps}" if start else f"{total_steps} steps"
    print(
        f"finetune: {settings.model.size} with {settings.head.kind} head ({millions:.1f} M parameters) from {settings.init}, "
        f"{going}, peak lr {settings.optim.lr:.3g}, run {settings.run_dir}",
        flush=True,
    )


def evaluate(
    settings: config.Finetune,
    benchmark: Benchmark,
    module: SupervisedReID,
    model_settings: dict[str, Any],
    device: torch.device,
    log: metrics.RunLog,
) -> None:
    """Measure the last epoch, the only one that is measured, and write the record into the run."""
    features = retrieval.model_features(module.model, mean=model_settings["mean"], std=model_settings["std"], device=device)
    record = retrieval.measure(benchmark, features, img_size=settings.model.img_size, num_threads=dist.usable_cores())
    record |= {"name": Path(settings.run_dir).name, "init": settings.init, "commit": metrics.git_commit()}
    record["run_hash"] = run_hash(settings)
    retrieval.write_record(Path(settings.run_dir), record)
    log.say(retrieval.table_row(record))
