"""PersonMAE pre-training: build, loop, save. Read this file first.

``personmae pretrain CONFIG [a.b=c ...]`` and ``deepspeed launcher/pretrain.py --config CONFIG [a.b=c ...]`` both end here.
"""

import contextlib
import gc
import itertools
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from personmae import batch_plan, config, dist, optim, precision
from personmae.checkpoint import run_lock, start_anew
from personmae.checkpoint.saver import Saver
from personmae.checkpoint.writer import Schedule, join_ranks
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader, to_device
from personmae.engine.base import Engine
from personmae.errors import UserError
from personmae.floor import FloorEstimate
from personmae.guard import Guard
from personmae.model import teacher as ema
from personmae.model.compiled import choose_prepare, compile_parts
from personmae.model.inputs import Batch, RegionSpec
from personmae.model.personmae import PersonMAE
from personmae.monitor import run_log
from personmae.monitor.heartbeat import Phase
from personmae.monitor.rank_metrics import RankMetrics
from personmae.pretrain_log import StepLog, export_plan, log_end, log_setup, next_command
from personmae.pretrain_probe import Prober
from personmae.pretrain_start import Start, read_start
from personmae.pretrain_state import (
    PretrainState,
    Spiked,
    build_model,
    build_teacher,
    count_steps,
    last_step_counted,
    open_writer,
    peak_lr,
    resume,
    roll_back,
    save,
)
from personmae.system import compile_cache

PAPER_STEPS = 204_100  # 100 epochs of 4,180,243 images at a global batch of 2,048
Prepare = Callable[..., Batch]


def run(settings: config.Pretrain) -> None:
    """Train until ``total_steps`` are done, resuming what the run directory holds.

    Raises:
        UserError: the configuration or the data cannot be trained on. Found before the first step.
        Stopped: a signal asked for it. The state is saved.
        Diverged: gradients are no longer finite, or the loss has jumped too often.
    """
    began, world = time.monotonic(), dist.read_world()
    start = read_start(settings)
    settings = start.settings if start else settings
    metrics = RankMetrics("pretrain", **settings.metrics.rank_metrics_arguments())
    plan = batch_plan.plan_batch(settings.train.global_batch_size, world.world_size, settings.train.max_micro_batch_size)
    stop = dist.StopSignal()
    dist.start(world)
    shards = open_shards(settings, world)
    metrics.read("stream", shards.counters.registry)
    state, prepare = build(settings, world, plan, shards, start)
    held = None
    try:
        held = run_lock.lock(settings.run_dir) if world.is_first else None  # before anything there is renamed or fetched
        with metrics.restoring():
            found = resume(state) if start_anew.goes_on(settings.run_dir, **settings.checkpoint.start_arguments()) else None
        if state.step >= state.total_steps:
            if world.is_first:
                open_writer(settings, found, {}).close()  # the last checkpoint may not be uploaded yet
                print(f"{settings.run_dir} is complete: {state.step} of {state.total_steps} steps are done", flush=True)
                print(f"next: {next_command(settings)}", flush=True)
            metrics.complete()
            return
        if world.is_first:
            log_setup(state)
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
            log_end(state, time.monotonic() - began)
    finally:
        shards.close()
        state.engine.close()
        dist.stop()
        if held:
            held.close()
        metrics.close(lambda: stop.requested)


def train(state: PretrainState, found: Path | None, prepare: Prepare, metrics: RankMetrics, stop: dist.StopSignal) -> None:
    """The loop: from the state that was ``found``, or from the start, to the end."""
    settings, world, engine, teacher, total_steps = state.settings, state.world, state.engine, state.teacher, state.total_steps
    schedule = Schedule(**settings.checkpoint.schedule_arguments())
    guard = Guard(
        world.device,
        max_skipped_steps=settings.train.max_skipped_steps,
        spike_factor=settings.train.spike_factor,
        loss_ema=state.loss_ema,
    )
    with contextlib.ExitStack() as stack:  # closed from the last to the first, each though another may raise
        saver = stack.enter_context(closing(build_saver(state, found, schedule, guard, metrics, stop)))
        log = stack.enter_context(closing(open_log(state, metrics)))
        reader = stack.enter_context(closing(build_reader(state)))
        export_plan(state, metrics, saver.writer, reader.steps_per_epoch)
        steps = StepLog(state, log, metrics, guard, reader, stop)
        first = good = state.step
        floor = FloorEstimate(state.floor, steps_left=total_steps - first, global_batch_size=state.plan.global_batch_size)
        compiling = ", then compiling, which takes minutes" if settings.train.compile else ""
        log.log(f"reading the first images{compiling} ...")
        copies = torch.cuda.Stream() if world.device.type == "cuda" else None
        working: Phase = "compile" if settings.train.compile else "step"  # what the next step is
        while state.step < total_steps:
            metrics.beat("data_wait", state.step)
            reader.wait(lambda: stop.requested)  # while a store is away, a run can still be stopped
            metrics.beat(working, state.step)
            silent = saver.at(state.step, silent=log.is_due())  # saves what is due, and ends a run that is to stop
            parts = []
            for micro in range(state.plan.grad_accum_steps):
                metrics.beat("data_wait", state.step)
                batch = to_device(next(reader), world.device, copies)
                metrics.beat(working, state.step)
                metrics.enter("inputs")
                if settings.train.cuda_graphs:
                    torch.compiler.cudagraph_mark_step_begin()  # what a replay wrote before may be written over
                inputs = prepare(*batch, state.spec)
                floor.add(inputs)
                if teacher:
                    inputs["target"] = teacher.look(inputs["patches_b"])
                metrics.enter("forward_backward")
                parts.append(engine.forward_backward(inputs, last_micro=micro == state.plan.grad_accum_steps - 1))
            metrics.enter("optimizer")
            losses = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
            lr_scale = lr_scale_at(settings, state.step, total_steps)
            grad_norm, skipped = engine.step(lr_scale)
            if teacher:
                with engine.full_params(engine.module.get_submodule("encoder")) as params:
                    teacher.update(params, momentum_at(settings, state.step, total_steps), skipped)
                if teacher.centre is not None:
                    dist.average_buffers(teacher.centre)
            guard.add(losses["loss"], skipped)
            state.step, state.cursor, working = state.step + 1, state.cursor + 1, "step"
            if found_floor := floor.step():
                state.floor = found_floor
                log.log(f"pretrain: {found_floor}")
            if state.step == first + 1:
                freeze_garbage()
            metrics.count(state.step, state.plan.global_batch_size)
            lr, saves = lr_scale * peak_lr(settings), schedule.by_step(state.step)
            if steps.after(losses, grad_norm, lr, silent=silent, at_checkpoint=saves):
                if guard.spiked():  # a probe changes nothing of what the guard compares
                    raise Spiked(good)
                good, state.loss_ema = state.step, guard.loss_ema
        saver.end(state.step)


def build(
    settings: config.Pretrain, world: dist.World, plan: batch_plan.BatchPlan, shards: ShardSet, start: Start | None = None
) -> tuple[PretrainState, Prepare]:
    """What a run is made of at its first step, and what turns a batch of images into regions."""
    chosen = precision.choose(settings.train.precision, str(world.device), share=dist.from_first_rank)
    torch.manual_seed(settings.seed)
    model = build_model(settings, chosen, start).to(world.device)
    spec = RegionSpec(**settings.region_arguments())
    teacher = build_teacher(settings, model, plan, spec)
    prober = Prober(settings, model.encoder, world) if settings.probe.benchmark else None
    prepare = choose_prepare(model, **settings.prepare_arguments())
    if settings.train.compile:
        compile_cache.mend()
        compile_parts(model, teacher, settings.train.cuda_graphs)
    engine, total_steps = build_engine(settings, model, plan), count_steps(settings, len(shards))
    state = PretrainState(settings, world, plan, spec, shards, engine, teacher, total_steps, chosen, prober=prober, start=start)
    return state, prepare


def build_saver(
    state: PretrainState, found: Path | None, schedule: Schedule, guard: Guard, metrics: RankMetrics, stop: dist.StopSignal
) -> Saver:
    """What saves the run's state. Ranks that share it write it together."""
    settings = state.settings
    team = join_ranks(settings.run_dir) if state.engine.is_sharded else {}
    writer = open_writer(settings, found, team) if state.world.is_first or team else None
    return Saver(
        writer,
        schedule,
        stop,
        metrics,
        save=lambda: save(state, writer, spread=bool(team)),
        counts=lambda: last_step_counted(guard, state),
        run_dir=settings.run_dir,
        first_step=state.step,
        total_steps=state.total_steps,
    )


def open_log(state: PretrainState, metrics: RankMetrics) -> run_log.RunLog:
    """The first rank's log of the steps to come."""
    return run_log.RunLog(
        state.settings.run_dir,
        is_first=state.world.is_first,
        title="pretrain",
        total_steps=state.total_steps,
        first_step=state.step,
        numbers=metrics.run,
    )


def freeze_garbage() -> None:
    """Leave what is set up and compiled to itself: going over all that again takes 0.2 s of a rank while others wait."""
    gc.collect()
    gc.freeze()


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
            "data.cache_dir must name a disk of each host where several hosts read from an object store. It is empty, which "
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
