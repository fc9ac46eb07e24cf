"""PersonMAE pre-training: build, loop, save. Read this file first.

``personmae pretrain CONFIG [a.b=c ...]`` and ``deepspeed launcher/pretrain.py --config CONFIG [a.b=c ...]`` both end here.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personmae import checkpoint, config, dist, metrics, optim
from personmae.data import storage
from personmae.data.stream import BatchReader, CanvasBatch, ShardSet
from personmae.engine.base import Engine, PortableState
from personmae.errors import Diverged, Stopped, UserError
from personmae.model import teacher as ema
from personmae.model.personmae import PersonMAE, View, cut_batch, draw_batch
from personmae.model.teacher import Teacher
from personmae.plan import show_plan

PAPER_STEPS = 204_100  # 100 epochs of 4,180,243 images at a global batch of 2,048
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(settings: config.Pretrain) -> None:
    """Train until ``total_steps`` are done, resuming what the run directory holds.

    Raises:
        UserError: the configuration or the data cannot be trained on; found before the first step.
        Stopped: a signal asked for it; the state is saved.
    """
    world = dist.read_world()
    plan = dist.plan_batch(settings.train.global_batch_size, world.world_size, settings.train.max_micro_batch_size)
    stop = dist.StopSignal()
    dist.start(world)
    shards = open_shards(settings, world)
    total_steps = count_steps(settings, len(shards))

    torch.manual_seed(settings.seed)
    model = build_model(settings).to(world.device)
    view = View(**settings.view_arguments())
    teacher = Teacher(model.encoder, view.grid, model.compute_dtype).to(world.device) if settings.loss.feature_weight else None
    cut = cut_batch
    if settings.train.compile:
        model.compile()
        cut = torch.compile(cut_batch)
        if teacher:
            teacher.compile()
    engine = build_engine(settings, model, plan)

    start = resume(settings, engine, teacher, shards) if settings.checkpoint.resume == "auto" else 0
    if start >= total_steps:
        if world.is_first:
            print(f"{settings.run_dir} is complete: {start} of {total_steps} steps are done", flush=True)
        shards.close()
        engine.close()
        dist.stop()
        return
    reader = build_reader(settings, shards, plan, world, view, first_step=start, total_steps=total_steps)
    held = checkpoint.lock(settings.run_dir) if world.is_first else None
    if world.is_first:
        announce(settings, model, plan, len(shards), total_steps, start)
    log = metrics.RunLog(settings.run_dir, is_first=world.is_first, title="pretrain", total_steps=total_steps, first_step=start)
    step, saved, finite, num_bad = start, start, torch.tensor(True, device=world.device), 0

    def keep() -> None:
        if engine.any(not finite):
            raise Diverged(f"the loss is not finite by step {step}; {settings.run_dir} keeps an earlier state")
        save(settings, engine, teacher, step, total_steps, shards, world.is_first)

    try:
        while step < total_steps:
            reader.wait(lambda: stop.requested)  # while a store is away, a run can still be stopped
            if engine.any(stop.requested):
                if step > saved:
                    keep()
                kept = f"state saved in {settings.run_dir}" if step else "nothing to save yet"
                raise Stopped(f"at step {step} of {total_steps}, {kept}; run this again to go on")
            parts = []
            for micro in range(plan.grad_accum_steps):
                batch = to_device(next(reader), world.device)
                inputs = cut(batch.canvas, batch.size, draw_batch(batch.keys, batch.native_size, view), view)
                if teacher:
                    inputs["target"] = teacher(inputs["patches_b"])
                parts.append(engine.forward_backward(inputs, last_micro=micro == plan.grad_accum_steps - 1))
            lr_scale = lr_scale_at(settings, step, total_steps)
            grad_norm = engine.step(lr_scale)
            if teacher:
                teacher.update(model.encoder, momentum_at(settings, step, total_steps))
            step += 1

            finite &= torch.stack([part["loss"] for part in parts]).isfinite().all()
            log.advance(step)
            if step % settings.train.log_every == 0 or step == total_steps:
                values = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
                values["grad_norm"] = grad_norm
                means = mean_over_ranks(values)  # the only wait for the device in this loop
                means |= {"lr": lr_scale * peak_lr(settings), "data_wait": reader.share_waited()}
                log.log(step, means, images_per_step=plan.global_batch_size)
                num_bad = tell_bad_samples(reader, num_bad)
            if step % settings.checkpoint.every_steps == 0 or step == total_steps:
                keep()
                saved = step
    finally:
        reader.close()
        log.close()
        shards.close()
        engine.close()
        dist.stop()
        if held:
            held.close()


def dry_run(settings: config.Pretrain, world_size: int) -> None:
    """Open the data and print what the run would come to on ``world_size`` ranks; nothing is written or trained.

    Raises:
        UserError: the data cannot be read, or the ranks cannot share the batch.
    """
    with tempfile.TemporaryDirectory() as cache, ShardSet(settings.data.shards, cache) as shards:
        num_samples, total_steps = len(shards), count_steps(settings, len(shards))
    images = total_steps * settings.train.global_batch_size
    facts = {
        "size": f"{settings.model.size} at {settings.model.img_size[0]}x{settings.model.img_size[1]}",
        "data": f"{num_samples:,} samples at {settings.data.shards}",
        "run": f"{total_steps:,} steps, {images:,} images, {images / num_samples:.1f} epochs, in {settings.run_dir}",
        "engine": settings.engine.name,
    }
    show_plan(
        build_model(settings),
        View(**settings.view_arguments()),
        global_batch_size=settings.train.global_batch_size,
        max_micro_batch_size=settings.train.max_micro_batch_size,
        world_size=world_size,
        facts=facts,
    )


def build_model(settings: config.Pretrain) -> PersonMAE:
    """Student and decoders, freshly initialised."""
    model = PersonMAE(**settings.model_arguments(), compute_dtype=_DTYPES[settings.train.precision])
    model.encoder.grad_checkpointing = settings.train.grad_checkpointing
    return model


def build_engine(settings: config.Pretrain, model: PersonMAE, plan: dist.BatchPlan) -> Engine:
    """The engine that the configuration names."""
    groups = optim.param_groups(model.named_parameters(), lr=peak_lr(settings), weight_decay=settings.optim.weight_decay)
    optimizer = optim.adamw(groups, settings.optim.betas)
    if settings.engine.name == "native":
        from personmae.engine.native import NativeEngine

        return NativeEngine(model, optimizer, grad_accum_steps=plan.grad_accum_steps, max_norm=settings.optim.max_norm)
    from personmae.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(
        model,
        optimizer,
        micro_batch_size=plan.micro_batch_size,
        grad_accum_steps=plan.grad_accum_steps,
        max_norm=settings.optim.max_norm,
        zero_stage=settings.engine.deepspeed.zero_stage,
        extra=settings.engine.deepspeed.extra,
    )


def open_shards(settings: config.Pretrain, world: dist.World) -> ShardSet:
    """The data set, with its cache below the run's directory unless another is named.

    Raises:
        UserError: it cannot be read, or several hosts would share a cache.
    """
    if "://" in settings.data.shards and not settings.data.cache_dir and world.local_world_size < world.world_size:
        raise UserError(
            "data.cache_dir must name a disk of each host where several hosts read from an object store; it is empty, which "
            "means run_dir, and hosts share that"
        )
    limit = settings.data.cache_limit_gb
    return ShardSet(
        settings.data.shards,
        settings.data.cache_dir or Path(settings.run_dir) / "shards",
        cache_limit_bytes=None if limit is None else round(limit * 1e9),
        retry_seconds=settings.data.retry_seconds,
    )


def build_reader(
    settings: config.Pretrain,
    shards: ShardSet,
    plan: dist.BatchPlan,
    world: dist.World,
    view: View,
    *,
    first_step: int,
    total_steps: int,
) -> BatchReader:
    """This rank's batches from ``first_step`` to the run's last."""
    return BatchReader(
        shards,
        canvas_size=view.canvas_size,
        seed=settings.seed,
        global_batch_size=plan.global_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        micro_batch_size=plan.micro_batch_size,
        first_step=first_step,
        total_steps=total_steps,
        num_threads=settings.data.num_threads or max(1, dist.usable_cores() // world.local_world_size),
        prefetch_batches=settings.data.prefetch_batches,
        block_size=settings.data.shuffle_block_size,
        max_bad_ratio=settings.data.max_bad_ratio,
        num_connections=settings.data.num_connections,
        num_ahead=settings.data.prefetch_shards,
    )


def peak_lr(settings: config.Pretrain) -> float:
    """The linear rule of MAE, unless ``optim.lr`` is given."""
    return settings.optim.lr or settings.optim.base_lr * settings.train.global_batch_size / 256


def lr_scale_at(settings: config.Pretrain, step: int, total_steps: int) -> float:
    """The step's share of the peak learning rate."""
    return optim.lr_scale_at(
        step,
        total_steps,
        warmup_steps=round(settings.optim.warmup_fraction * total_steps),
        min_ratio=min(1.0, settings.optim.min_lr / peak_lr(settings)),
    )


def momentum_at(settings: config.Pretrain, step: int, total_steps: int) -> float:
    """gamma of Eq. (6) at a step."""
    return ema.momentum_at(
        step,
        total_steps,
        momentum=settings.teacher.momentum,
        ramp_fraction=settings.teacher.ramp_fraction,
        reference_steps=PAPER_STEPS if settings.teacher.horizon_scaling else None,
    )


def count_steps(settings: config.Pretrain, num_samples: int) -> int:
    """``total_steps``, or what ``epochs`` comes to."""
    if settings.train.total_steps:
        return settings.train.total_steps
    if not settings.train.epochs:
        raise UserError("train.epochs or train.total_steps is required; both are empty")
    return max(1, round(settings.train.epochs * (num_samples // settings.train.global_batch_size)))


def to_device(batch: CanvasBatch, device: torch.device) -> CanvasBatch:
    """Copy a host batch; asynchronous from pinned memory."""
    return CanvasBatch(*(tensor.to(device, non_blocking=True) for tensor in batch))


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Means of scalars over ranks, read from the device in one copy."""
    stacked = torch.stack([value.float() for value in values.values()])
    return dict(zip(values, dist.mean(stacked).tolist(), strict=True))


def model_record(model: config.Model) -> dict[str, Any]:
    """What must travel with the weights: architecture and preprocessing."""
    return model.model_dump(mode="json")


def save(
    settings: config.Pretrain,
    engine: Engine,
    teacher: Teacher | None,
    step: int,
    total_steps: int,
    shards: ShardSet,
    is_first: bool,
) -> None:
    """Write a checkpoint; here stands everything that a resumed run needs."""
    if is_first:
        state = engine.portable_state()
        tensors = {"student": state.params, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        if teacher:
            tensors["teacher"] = checkpoint.to_cpu(dict(teacher.encoder.state_dict()))
        record = {
            "total_steps": total_steps,
            "images_seen": step * settings.train.global_batch_size,
            "num_updates": state.num_updates,
            "identity": identity(settings, shards),
            "model": model_record(settings.model),
            "config_hash": config.config_hash(settings),
            "versions": checkpoint.versions(),
        }
        checkpoint.write(
            settings.run_dir, checkpoint.Checkpoint(step, tensors, record), keep_last=settings.checkpoint.keep_last
        )
    dist.barrier()


def identity(settings: config.Pretrain, shards: ShardSet) -> dict[str, Any]:
    """What must agree before a run is resumed: settings, and the data set, since sample numbers follow from its shards."""
    return settings.identity() | {"data.num_samples": len(shards), "data.index": shards.digest}


def resume(settings: config.Pretrain, engine: Engine, teacher: Teacher | None, shards: ShardSet) -> int:
    """Take over the newest valid checkpoint of the run, if there is one; returns the steps it has done."""
    found = checkpoint.newest_for_all(settings.run_dir)
    if not found:
        return 0
    saved = checkpoint.read(found)
    ours, theirs = identity(settings, shards), saved.state.get("identity", {})
    if differing := [key for key in ours if theirs.get(key) != ours[key]]:
        told = ", ".join(f"{key}={theirs.get(key)} (now {ours[key]})" for key in differing[:4])
        raise UserError(
            f"{found} belongs to a run with other settings: {told}; use the same, another run_dir, or checkpoint.resume=none"
        )
    checkpoint.load_strictly(engine.module, saved.tensors["student"], found)
    engine.load_portable(
        PortableState(
            saved.tensors["student"], saved.tensors["exp_avg"], saved.tensors["exp_avg_sq"], saved.state["num_updates"]
        )
    )
    if teacher:
        checkpoint.load_strictly(teacher.encoder, saved.tensors.get("teacher", {}), found)
    return saved.step


def announce(
    settings: config.Pretrain, model: PersonMAE, plan: dist.BatchPlan, num_samples: int, total_steps: int, start: int
) -> None:
    """Record the run's set-up and print the sizes that follow from it."""
    metrics.record_run(
        settings.run_dir,
        config_yaml=config.dump_yaml(settings),
        config_hash=config.config_hash(settings),
        seed=settings.seed,
        versions=checkpoint.versions(),
    )
    if settings.data.shards.startswith("s3://"):
        print(f"pretrain: {settings.data.shards} with {storage.s3_identity()}")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"pretrain: {settings.model.size} ({millions:.1f} M parameters with decoders), {num_samples:,} samples")
    print(f"pretrain: {plan}")
    going = f"resuming at step {start} of {total_steps}" if start else f"{total_steps} steps"
    print(
        f"pretrain: {going}, peak lr {peak_lr(settings):.3g}, engine {settings.engine.name}, run {settings.run_dir}",
        flush=True,
    )


def tell_bad_samples(reader: BatchReader, told: int) -> int:
    """Name the unreadable pictures that were replaced since ``told`` of them were; returns how many there are now."""
    new = reader.bad_samples[told:]
    for where in new:
        print(f"unreadable picture replaced: {where}", flush=True)
    return told + len(new)
