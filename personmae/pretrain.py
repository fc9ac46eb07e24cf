"""PersonMAE pre-training: build, loop, save. Read this file first.

``personmae pretrain CONFIG [a.b=c ...]`` and ``deepspeed launcher/pretrain.py --config CONFIG [a.b=c ...]`` both end here.
"""

import contextlib
import gc
import itertools
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from personmae import batch_plan, config, dist, flops, optim, precision
from personmae.checkpoint import portable, run_lock, start_anew
from personmae.checkpoint.writer import Schedule, Writer, finish, join_ranks
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader, to_device
from personmae.engine.base import Engine
from personmae.errors import Stopped, UserError
from personmae.floor import FloorEstimate, floor_warning
from personmae.guard import Guard
from personmae.model import teacher as ema
from personmae.model.compiled import choose_prepare, compile_parts
from personmae.model.inputs import Batch, RegionSpec
from personmae.model.personmae import PersonMAE
from personmae.model.vit import SIZES
from personmae.monitor import progress, run_log
from personmae.monitor.heartbeat import Phase
from personmae.monitor.rank_metrics import RankMetrics
from personmae.pretrain_probe import Prober
from personmae.pretrain_state import (
    PretrainState,
    Spiked,
    build_model,
    build_teacher,
    count_steps,
    last_step_counted,
    open_writer,
    resume,
    roll_back,
    save,
)
from personmae.system import compile_cache, storage

PAPER_STEPS = 204_100  # 100 epochs of 4,180,243 images at a global batch of 2,048


def run(settings: config.Pretrain) -> None:
    """Train until ``total_steps`` are done, resuming what the run directory holds.

    Raises:
        UserError: the configuration or the data cannot be trained on; found before the first step.
        Stopped: a signal asked for it; the state is saved.
        Diverged: gradients are no longer finite, or the loss has jumped too often.
    """
    began, world = time.monotonic(), dist.read_world()
    metrics = RankMetrics("pretrain", **settings.metrics.rank_metrics_arguments())
    plan = batch_plan.plan_batch(settings.train.global_batch_size, world.world_size, settings.train.max_micro_batch_size)
    stop = dist.StopSignal()
    dist.start(world)
    shards = open_shards(settings, world)
    metrics.read("stream", shards.counters.registry)

    chosen = precision.choose(settings.train.precision, str(world.device), share=dist.from_first_rank)
    torch.manual_seed(settings.seed)
    model = build_model(settings, chosen).to(world.device)
    spec = RegionSpec(**settings.region_arguments())
    teacher = build_teacher(settings, model, plan, spec)
    prober = Prober(settings, model.encoder, world) if settings.probe.benchmark else None
    prepare = choose_prepare(model, **settings.prepare_arguments())
    if settings.train.compile:
        compile_cache.mend()
        compile_parts(model, teacher, settings.train.cuda_graphs)
    engine = build_engine(settings, model, plan)

    state = PretrainState(
        settings, world, plan, spec, shards, engine, teacher, count_steps(settings, len(shards)), chosen, prober=prober
    )
    held = None
    try:
        held = run_lock.lock(settings.run_dir) if world.is_first else None  # before anything there is renamed or fetched
        with metrics.restoring():
            found = resume(state) if start_anew.goes_on(settings.run_dir, **settings.checkpoint.start_arguments()) else None
        if state.step >= state.total_steps:
            if world.is_first:
                open_writer(settings, found, {}).close()  # the last checkpoint may not have got to the store
                print(f"{settings.run_dir} is complete: {state.step} of {state.total_steps} steps are done", flush=True)
                print(f"next: {following(settings)}", flush=True)
            metrics.complete()
            return
        if world.is_first:
            announce(state)
        for attempt in itertools.count():
            try:
                train(state, found, prepare, metrics, stop)
                break
            except Spiked as spike:
                metrics.beat("start", state.step)
                with metrics.restoring():
                    found = roll_back(state, spike, attempt)
                if metrics.run:
                    metrics.run.rollbacks.inc()
        metrics.complete(settings.run_dir, settings.checkpoint.upload_to)
        if world.is_first:
            tell_end(state, time.monotonic() - began)
    finally:
        shards.close()
        engine.close()
        dist.stop()
        if held:
            held.close()
        metrics.close(lambda: stop.requested)


def train(
    state: PretrainState, found: Path | None, prepare: Callable[..., Batch], metrics: RankMetrics, stop: dist.StopSignal
) -> None:
    """The loop: from the state that was ``found``, or from the start, to the end."""
    settings, world, engine, teacher, total_steps = state.settings, state.world, state.engine, state.teacher, state.total_steps
    team = join_ranks(settings.run_dir) if engine.is_sharded else {}
    writer = open_writer(settings, found, team) if world.is_first or team else None
    schedule = Schedule(**settings.checkpoint.schedule_arguments())
    log = run_log.RunLog(
        settings.run_dir,
        is_first=world.is_first,
        title="pretrain",
        total_steps=total_steps,
        first_step=state.step,
        numbers=metrics.run,
    )
    reader = build_reader(state)
    tell_plan(state, metrics, writer, reader.steps_per_epoch)
    guard = Guard(
        world.device,
        max_skipped_steps=settings.train.max_skipped_steps,
        spike_factor=settings.train.spike_factor,
        usual=state.usual_loss,
    )
    step = saved = good = first = state.step
    estimate = FloorEstimate(state.floor, steps_left=total_steps - step, global_batch_size=state.plan.global_batch_size)
    log.log("reading the first images" + (", then compiling, which takes minutes" if settings.train.compile else "") + " ...")
    num_bad, due = 0, False
    copies = torch.cuda.Stream() if world.device.type == "cuda" else None
    working: Phase = "compile" if settings.train.compile else "step"  # what the next step is
    try:
        while step < total_steps:
            metrics.beat("data_wait", step)
            reader.wait(lambda: stop.requested)  # while a store is away, a run can still be stopped
            metrics.beat(working, step)
            timed = world.is_first and writer is not None and not writer.busy and schedule.by_time(writer.seconds_since_save)
            stopping, timed, shown = dist.any_ranks(stop.requested, timed, log.is_due())
            due |= step > saved and (stopping or timed or schedule.by_step(step))
            if due and last_step_counted(guard, state):
                metrics.beat("checkpoint", step)
                save(state, writer, spread=bool(team))
                metrics.beat(working, step)
                saved, due = step, False
            if stopping:
                stop.settle()
                metrics.beat("checkpoint", step)
                finish(writer)
                kept = f"state saved in {settings.run_dir}" if saved else "nothing to save yet"
                raise Stopped(f"at step {step} of {total_steps}, {kept}; run this again to go on")
            parts = []
            for micro in range(state.plan.grad_accum_steps):
                metrics.beat("data_wait", step)
                batch = to_device(next(reader), world.device, copies)
                metrics.beat(working, step)
                metrics.enter("inputs")
                if settings.train.cuda_graphs:
                    torch.compiler.cudagraph_mark_step_begin()  # what a replay wrote before may be written over
                inputs = prepare(*batch, state.spec)
                estimate.note(inputs)
                if teacher:
                    inputs["target"] = teacher.look(inputs["patches_b"])
                metrics.enter("forward_backward")
                parts.append(engine.forward_backward(inputs, last_micro=micro == state.plan.grad_accum_steps - 1))
            metrics.enter("optimizer")
            losses = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
            lr_scale = lr_scale_at(settings, step, total_steps)
            grad_norm, skipped = engine.step(lr_scale)
            if teacher:
                with engine.full_params(engine.module.get_submodule("encoder")) as params:
                    teacher.update(params, momentum_at(settings, step, total_steps), skipped)
                if teacher.centre is not None:
                    dist.average_buffers(teacher.centre)
            guard.note(losses["loss"], skipped)
            step, state.step, state.cursor, working = step + 1, step + 1, state.cursor + 1, "step"
            if sounded := estimate.step():
                state.floor = sounded
                log.log(f"pretrain: {sounded}")
            if step == first + 1:  # set up and compiled: going over all that again takes 0.2 s of a rank while others wait
                gc.collect()
                gc.freeze()

            metrics.count(step, state.plan.global_batch_size)
            log.advance(step)
            shown |= step == first + 1
            in_turn = step % settings.train.log_every == 0 or step == total_steps
            prober = state.prober if schedule.by_step(step) or step == total_steps else None
            probed = prober.run(engine, step, log, metrics, stop) if prober else {}
            logged = in_turn or prober is not None
            if shown and not logged:
                means = mean_over_ranks(losses | {"grad_norm": grad_norm}) | {"lr": lr_scale * peak_lr(settings)}
                log.display(step, means, images_per_step=state.plan.global_batch_size)
            if logged:
                means = mean_over_ranks(losses | {"grad_norm": grad_norm, "skipped_steps": guard.num_skipped})
                means |= {"lr": lr_scale * peak_lr(settings), "data_wait": reader.share_waited()} | probed
                constants = {"floor_position": state.floor.position, "floor_hue": state.floor.hue} if state.floor else {}
                log.record(step, means, images_per_step=state.plan.global_batch_size, constants=constants)
                last_step_counted(guard, state)  # like the lines above, the only wait for the device
                num_bad = tell_bad_samples(reader, num_bad)
            if in_turn:  # a probe changes nothing of what the guard compares
                if guard.spiked():
                    raise Spiked(good)
                good, state.usual_loss = step, guard.usual
        last_step_counted(guard, state)
        metrics.beat("checkpoint", step)
        save(state, writer, spread=bool(team))
        finish(writer)
    finally:
        with contextlib.ExitStack() as closing:  # from the last to the first, each though another may raise
            if writer:
                closing.callback(writer.close)
            closing.callback(log.close)
            closing.callback(reader.close)


def build_engine(settings: config.Pretrain, model: PersonMAE, plan: batch_plan.BatchPlan) -> Engine:
    """The engine that the configuration names."""
    groups = optim.param_groups(model.named_parameters(), lr=peak_lr(settings), weight_decay=settings.optim.weight_decay)
    optimizer = optim.adamw(groups, settings.optim.betas)
    if settings.engine.name == "native":
        from personmae.engine.native import NativeEngine

        return NativeEngine(
            model,
            optimizer,
            grad_accum_steps=plan.grad_accum_steps,
            max_norm=settings.optim.max_norm,
            is_graphed=settings.train.cuda_graphs,
        )
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


def build_reader(state: PretrainState) -> BatchReader:
    """This rank's batches from the run's cursor to its end."""
    data, world = state.settings.data, state.world
    return BatchReader(
        state.shards,
        canvas_size=state.spec.canvas_size,
        seed=state.settings.seed,
        global_batch_size=state.plan.global_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        micro_batch_size=state.plan.micro_batch_size,
        first_step=state.cursor,
        total_steps=state.cursor + state.total_steps - state.step,
        num_threads=data.num_threads or dist.threads_per_rank(world),
        prefetch_batches=data.prefetch_batches,
        block_size=data.shuffle_block_size,
        max_bad_ratio=data.max_bad_ratio,
        num_connections=data.num_connections,
        prefetch_shards=data.prefetch_shards,
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


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Means of scalars over ranks, read from the device in one copy."""
    stacked = torch.stack([value.float() for value in values.values()])
    return dict(zip(values, dist.mean(stacked).tolist(), strict=True))


def announce(state: PretrainState) -> None:
    """Record the run's set-up and print the sizes that follow from it."""
    settings, total_steps = state.settings, state.total_steps
    run_log.record_run(
        settings.run_dir,
        config_yaml=config.dump_yaml(settings),
        config_hash=config.config_hash(settings),
        seed=settings.seed,
        versions=portable.versions(),
        first_step=state.step,
    )
    if settings.data.shards.startswith("s3://"):
        print(f"pretrain: {settings.data.shards} with {storage.s3_identity()}")
    millions = sum(p.numel() for p in state.engine.module.parameters()) / 1e6
    print(f"pretrain: {settings.model.size} ({millions:.1f} M parameters with decoders), {len(state.shards):,} samples")
    print(f"pretrain: {state.plan}")
    print(f"pretrain: {state.precision}")
    going = f"resuming at step {state.step} of {total_steps}" if state.step else f"{total_steps} steps"
    print(
        f"pretrain: {going}, peak lr {peak_lr(settings):.3g}, engine {settings.engine.name}, run {settings.run_dir}",
        flush=True,
    )


def tell_end(state: PretrainState, seconds: float) -> None:
    """Say where the encoder is, how long that took, what to do with it, and whether it has learned too little."""
    settings, folders = state.settings, portable.folders(state.settings.run_dir)
    where = f"the encoder is in {folders[0] if folders else settings.run_dir}"
    if state.floor and (told := floor_warning(state.floor, run_log.read_records(settings.run_dir))):
        progress.log_to_stderr(told)
    progress.log_to_stderr(progress.ending("pretrain", seconds, where, following(settings)))


def following(settings: config.Pretrain) -> str:
    """The command that puts the encoder to use."""
    return (
        f"personmae finetune configs/finetune_market1501.yaml model.size={settings.model.size} "
        f"init={shlex.quote(settings.run_dir)} root=DATA run_dir=RUN"
    )


def tell_plan(state: PretrainState, metrics: RankMetrics, writer: Writer | None, steps_per_epoch: int) -> None:
    """What Prometheus is told about a run before its first step."""
    settings, world = state.settings, state.world
    if writer:
        metrics.read_writer(writer.counters.registry)
    if not metrics.run:
        return
    peak = settings.metrics.peak_tflops and 1e12 * settings.metrics.peak_tflops
    if not peak and world.device.type == "cuda":
        peak = flops.peak_flops(torch.cuda.get_device_name(world.device), state.precision.name)
    metrics.run.plan(
        first_step=state.step,
        total_steps=state.total_steps,
        world_size=world.world_size,
        steps_per_epoch=steps_per_epoch,
        checkpoint_steps=settings.checkpoint.every_steps,
        flops_per_image=flops_per_image(settings),
        peak_flops=peak,
    )


def flops_per_image(settings: config.Pretrain) -> float:
    """Operations of a step, for each image."""
    model, width = settings.model, SIZES[settings.model.size]["embed_dim"]
    num_patches = model.img_size[0] * model.img_size[1] // model.patch_size**2
    return flops.pretrain_flops(
        num_visible=num_patches - round(settings.mask.ratio * num_patches),
        num_patches=num_patches,
        patch_size=model.patch_size,
        embed_dim=width,
        depth=SIZES[model.size]["depth"],
        decoder_depth=settings.decoders.depth,
        pixel_dim=settings.decoders.pixel_dim or min(512, width),
        feature_dim=(settings.decoders.feature_dim or width) if settings.loss.feature_weight else None,
        identity_dim=settings.loss.identity_dim if settings.loss.identity_weight else None,
    )


def tell_bad_samples(reader: BatchReader, told: int) -> int:
    """Name the unreadable images that were replaced since ``told`` of them were; returns how many there are now."""
    new = reader.bad_samples[told:]
    for where in new:
        print(f"unreadable image replaced: {where}", flush=True)
    return told + len(new)
