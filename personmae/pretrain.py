"""PersonMAE pre-training: build, loop, save. Read this file first.

``personmae pretrain CONFIG [a.b=c ...]`` and ``deepspeed launcher/pretrain.py --config CONFIG [a.b=c ...]`` both end here.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personmae import archive, checkpoint, config, dist, metrics, optim
from personmae.data import storage
from personmae.data.stream import BatchReader, CanvasBatch, ShardSet
from personmae.engine.base import Engine, PortableState
from personmae.errors import Diverged, Stopped, UserError
from personmae.heartbeat import Heartbeat, Phase
from personmae.keeper import Schedule, Writer
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
    heartbeat = Heartbeat()
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

    found = resume(settings, engine, teacher, shards) if settings.checkpoint.resume == "auto" else None
    start = checkpoint.step_of(found.name) or 0 if found else 0
    if start >= total_steps:
        if world.is_first:
            open_writer(settings, found).close()  # the last checkpoint may not have got to the store
            print(f"{settings.run_dir} is complete: {start} of {total_steps} steps are done", flush=True)
        shards.close()
        engine.close()
        dist.stop()
        return
    reader = build_reader(settings, shards, plan, world, view, first_step=start, total_steps=total_steps)
    held = checkpoint.lock(settings.run_dir) if world.is_first else None
    writer = open_writer(settings, found) if world.is_first else None
    wanted = settings.checkpoint
    schedule = Schedule(wanted.every_steps, wanted.every_seconds, wanted.keep_every)
    if world.is_first:
        announce(settings, model, plan, len(shards), total_steps, start)
    log = metrics.RunLog(settings.run_dir, is_first=world.is_first, title="pretrain", total_steps=total_steps, first_step=start)
    step = saved = start
    num_bad, due = 0, False
    in_row = num_skipped = torch.zeros((), device=world.device)  # skipped steps, counted where nothing waits for them
    working: Phase = "compile" if settings.train.compile else "step"  # what the next step is
    try:
        while step < total_steps:
            heartbeat.beat("wait_data", step)
            reader.wait(lambda: stop.requested)  # while a store is away, a run can still be stopped
            timed = writer is not None and not writer.busy and schedule.by_time(writer.seconds_since_save)
            stopping, timed = dist.any_ranks(stop.requested, timed)
            due |= step > saved and (stopping or timed or schedule.by_step(step))
            if due and last_step_counted(in_row, settings, step):
                heartbeat.beat("checkpoint", step)
                save(settings, writer, engine, teacher, step, total_steps, shards)
                saved, due = step, False
            if stopping:
                stop.settle()
                finish(writer)
                kept = f"state saved in {settings.run_dir}" if saved else "nothing to save yet"
                raise Stopped(f"at step {step} of {total_steps}, {kept}; run this again to go on")
            heartbeat.beat(working, step)
            parts = []
            for micro in range(plan.grad_accum_steps):
                batch = to_device(next(reader), world.device)
                inputs = cut(batch.canvas, batch.size, draw_batch(batch.keys, batch.native_size, view), view)
                if teacher:
                    inputs["target"] = teacher(inputs["patches_b"])
                parts.append(engine.forward_backward(inputs, last_micro=micro == plan.grad_accum_steps - 1))
            lr_scale = lr_scale_at(settings, step, total_steps)
            grad_norm, skipped = engine.step(lr_scale)
            if teacher:
                with engine.full_params(model.encoder) as params:
                    teacher.update(params, momentum_at(settings, step, total_steps), skipped)
            step, working = step + 1, "step"

            in_row, num_skipped = (in_row + skipped) * skipped, num_skipped + skipped
            log.advance(step)
            if step % settings.train.log_every == 0 or step == total_steps:
                values = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
                means = mean_over_ranks(values | {"grad_norm": grad_norm, "skipped_steps": num_skipped})
                means |= {"lr": lr_scale * peak_lr(settings), "data_wait": reader.share_waited()}
                log.log(step, means, images_per_step=plan.global_batch_size)
                last_step_counted(in_row, settings, step)  # like the line above, the only wait for the device
                num_bad = tell_bad_samples(reader, num_bad)
        last_step_counted(in_row, settings, step)
        heartbeat.beat("checkpoint", step)
        save(settings, writer, engine, teacher, step, total_steps, shards)
        finish(writer)
    finally:
        reader.close()
        log.close()
        shards.close()
        engine.close()
        dist.stop()
        if writer:
            writer.close()  # last: it may raise
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
    model.encoder.activation_checkpointing = settings.train.activation_checkpointing
    return model


def build_engine(settings: config.Pretrain, model: PersonMAE, plan: dist.BatchPlan) -> Engine:
    """The engine that the configuration names."""
    groups = optim.param_groups(model.named_parameters(), lr=peak_lr(settings), weight_decay=settings.optim.weight_decay)
    optimizer = optim.adamw(groups, settings.optim.betas)
    if settings.engine.name == "native":
        from personmae.engine.native import NativeEngine

        return NativeEngine(model, optimizer, grad_accum_steps=plan.grad_accum_steps, max_norm=settings.optim.max_norm)
    if settings.engine.name == "fsdp":
        from personmae.engine.fsdp import FsdpEngine

        return FsdpEngine(
            model,
            optimizer,
            grad_accum_steps=plan.grad_accum_steps,
            max_norm=settings.optim.max_norm,
            shard_size=settings.engine.fsdp.shard_size,
        )
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


def last_step_counted(in_row: Tensor, settings: config.Pretrain, step: int) -> bool:
    """Whether the last step changed the parameters: a state is saved only then. Waits for the device.

    Raises:
        Diverged: too many steps in a row were skipped.
    """
    if in_row >= settings.train.max_skipped_steps:
        raise Diverged(
            f"the gradient was not finite in {int(in_row)} steps in a row, up to step {step}; {settings.run_dir} keeps an "
            "earlier state"
        )
    return not in_row


def open_writer(settings: config.Pretrain, resumed: Path | None) -> Writer:
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
    settings: config.Pretrain,
    writer: Writer | None,
    engine: Engine,
    teacher: Teacher | None,
    step: int,
    total_steps: int,
    shards: ShardSet,
) -> None:
    """Have a checkpoint written; here stands everything that a resumed run needs."""
    state = engine.portable_state()  # by all ranks together
    if not writer or not state:
        return
    tensors = {"student": state.params, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    if teacher:
        tensors["teacher"] = dict(teacher.encoder.state_dict())
    record = {
        "total_steps": total_steps,
        "images_seen": step * settings.train.global_batch_size,
        "num_updates": state.num_updates,
        "identity": identity(settings, shards),
        "model": model_record(settings.model),
        "config_hash": config.config_hash(settings),
        "versions": checkpoint.versions(),
    }
    writer.save(checkpoint.Checkpoint(step, tensors, record))


def identity(settings: config.Pretrain, shards: ShardSet) -> dict[str, Any]:
    """What must agree before a run is resumed: settings, and the data set, since sample numbers follow from its shards."""
    return settings.identity() | {"data.num_samples": len(shards), "data.index": shards.digest}


def resume(settings: config.Pretrain, engine: Engine, teacher: Teacher | None, shards: ShardSet) -> Path | None:
    """Take over the newest valid checkpoint of the run, if there is one; returns where it lies."""
    found = archive.newest_for_all(settings.run_dir, settings.checkpoint.store)
    if not found:
        return None
    saved = checkpoint.read(found)
    ours, theirs = identity(settings, shards), saved.state.get("identity", {})
    if differing := [key for key in ours if theirs.get(key) != ours[key]]:
        told = ", ".join(f"{key}={theirs.get(key)} (now {ours[key]})" for key in differing[:4])
        raise UserError(
            f"{found} belongs to a run with other settings: {told}; use the same, another run_dir, or checkpoint.resume=none"
        )
    engine.load_portable(
        PortableState(
            saved.tensors["student"], saved.tensors["exp_avg"], saved.tensors["exp_avg_sq"], saved.state["num_updates"]
        )
    )
    if teacher:
        checkpoint.load_strictly(teacher.encoder, saved.tensors.get("teacher", {}), found)
    return found


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
