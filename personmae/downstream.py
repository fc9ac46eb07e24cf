"""What supervised and unsupervised training on a benchmark share: the run around the loop, saving, what a run is known by."""

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from personmae import batch_plan, config, dist, precision
from personmae.checkpoint import portable, resume_point, run_lock, start_anew
from personmae.checkpoint.saver import Saver
from personmae.checkpoint.writer import Schedule, Writer
from personmae.config import RANDOM
from personmae.engine.base import Engine, PortableState
from personmae.errors import Stopped
from personmae.guard import Guard
from personmae.monitor import environment, progress, run_log
from personmae.monitor.rank_metrics import RankMetrics
from personmae.precision import AUTO, Precision
from personmae.reid import datasets, retrieval
from personmae.reid.datasets import Benchmark, load_benchmark
from personmae.reid.features import timed
from personmae.reid.heads import ReIDModel, describe_start
from personmae.reid.transforms import ImageSet, augment, draw_augmentation

Settings = config.Finetune | config.Unsupervised


class Trained(Protocol):
    """A module with a ReID model in it."""

    model: ReIDModel
    compute_dtype: torch.dtype


class DownstreamState(Protocol):
    """What both programs know of a run."""

    step: int
    model_settings: dict[str, Any]
    resume_key: dict[str, Any]
    precision: Precision

    @property
    def settings(self) -> Settings: ...
    @property
    def world(self) -> dist.World: ...
    @property
    def benchmark(self) -> Benchmark: ...
    @property
    def module(self) -> Trained: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def total_steps(self) -> int: ...


SettingsT = TypeVar("SettingsT", config.Finetune, config.Unsupervised)
StateT = TypeVar("StateT", bound=DownstreamState)


@dataclass(frozen=True, slots=True)
class Parts(Generic[SettingsT, StateT]):
    """What each program does in its own way. ``run`` does the rest.

    ``check`` raises a UserError where settings and benchmark do not go together. ``build`` makes the state of step 0, ``load``
    takes over a checkpoint's tensors, and ``train`` is the loop.
    """

    name: Literal["finetune", "unsupervised"]
    check: Callable[[SettingsT, Benchmark], None]
    build: Callable[[SettingsT, dist.World, Benchmark, Precision], StateT]
    load: Callable[[StateT, portable.Checkpoint], None]
    log_setup: Callable[[StateT], None]
    train: Callable[[StateT, Path | None, run_log.RunLog, RankMetrics, dist.StopSignal], None]


def run(settings: SettingsT, parts: Parts[SettingsT, StateT]) -> None:
    """Train all epochs, resuming what the run directory holds, then evaluate. Writes ``result.json``.

    Raises:
        UserError: the configuration, the weights or the benchmark cannot be used. Found before the first step.
        Stopped: a signal asked for it. The state is saved.
        Diverged: gradients are no longer finite.
    """
    began, world = time.monotonic(), dist.read_world()
    metrics = RankMetrics(parts.name, **settings.metrics.rank_metrics_arguments())
    batch_size = settings.batch.num_ids * settings.batch.num_instances
    batch_plan.require_equal_parts(batch_size, settings.train.bn_group_size, world.world_size)
    benchmark = load_benchmark(settings.benchmark, settings.root, train_on_val=settings.train_on_val)
    parts.check(settings, benchmark)
    if start_anew.may_be_complete(settings.run_dir, settings.checkpoint.resume) and is_complete(settings, benchmark):
        if world.is_first:
            log_complete(settings)
        metrics.complete()
        metrics.close()
        return
    stop = dist.StopSignal()
    dist.start(world)
    chosen = precision.choose(settings.train.precision, str(world.device), share=dist.from_first_rank)
    state = parts.build(settings, world, benchmark, chosen)
    held = run_lock.lock(settings.run_dir) if world.is_first else None  # before anything there is renamed or fetched
    try:
        with metrics.restoring():
            goes_on = start_anew.goes_on(settings.run_dir, **settings.checkpoint.start_arguments())
            found = resume(state, parts.load) if goes_on else None
        if world.is_first:
            parts.log_setup(state)
        with contextlib.closing(open_log(state, parts.name, metrics)) as log:
            parts.train(state, found, log, metrics, stop)
            state.engine.close()
            evaluate(state, log, metrics, stop)
        metrics.complete(settings.run_dir, settings.checkpoint.upload_to)
        if world.is_first:
            log_end(settings, parts.name, time.monotonic() - began)
    finally:
        dist.stop()
        if held:
            held.close()
        metrics.close(lambda: stop.requested)


# --- what loops need ---


@contextlib.contextmanager
def open_images(state: DownstreamState, log: run_log.RunLog) -> Iterator[ImageSet]:
    """The training images, and the threads that read them until the end.

    Raises:
        UserError: one cannot be read.
    """
    paths = [sample.path for sample in state.benchmark.train]
    pool = ThreadPoolExecutor(dist.threads_per_rank(state.world))
    try:
        with timed(log.log, f"opening {len(paths):,} images"):
            images = ImageSet(paths, state.settings.model.img_size, pool=pool)
        yield images
    finally:
        pool.shutdown(cancel_futures=True)


def augmented(state: DownstreamState, images: Tensor, batch_size: int, ours: slice) -> Tensor:
    """This rank's images of a global batch, augmented on its device. Drop path is seeded too, so a resumed run repeats it."""
    settings = state.settings
    torch.manual_seed(settings.seed + 1000003 * state.step)
    drawn = draw_augmentation(
        batch_size, settings.model.img_size, seed=settings.seed, step=state.step, **settings.augment.model_dump()
    )
    return augment(
        images.to(state.world.device),
        drawn.part(ours),
        mean=state.model_settings["mean"],
        std=state.model_settings["std"],
        pad=settings.augment.pad,
    )


def build_saver(
    state: StateT,
    found: Path | None,
    save: Callable[[StateT, Writer | None], None],
    guard: Guard,
    metrics: RankMetrics,
    stop: dist.StopSignal,
) -> Saver:
    """What saves the run's state, on the first rank. Prometheus learns of it, and of the steps to come."""
    settings = state.settings
    writer = None
    if state.world.is_first:
        writer = Writer(settings.run_dir, resumed=found, **settings.checkpoint.writer_arguments())
        metrics.read_writer(writer.counters.registry)
    if metrics.run:
        metrics.run.plan(
            first_step=state.step,
            total_steps=state.total_steps,
            world_size=state.world.world_size,
            checkpoint_steps=settings.checkpoint.every_steps,
        )
    return Saver(
        writer,
        Schedule(**settings.checkpoint.schedule_arguments()),
        stop,
        metrics,
        save=lambda: save(state, writer),
        counts=lambda: guard.last_counted(state.step, settings.run_dir),
        run_dir=settings.run_dir,
        first_step=state.step,
        total_steps=state.total_steps,
    )


# --- what a run is known by, saved and resumed ---


def resume_key(
    settings: Settings, benchmark: Benchmark, precision_name: str, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What must agree before a run is resumed: settings, what ``auto`` came to, the first weights, the training images.

    Where the weights are gone, they are taken to be those of the ``known`` key.
    """
    init = settings.init
    if init != RANDOM:
        gone = known and not Path(init).exists()
        init = known.get("init") if known and gone else portable.digest(portable.locate(init))
    return settings.resume_key() | {"train.precision": precision_name, "init": init} | datasets.resume_key(benchmark)


def require_same(where: str | Path, settings: Settings, ours: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise a UserError unless what lies at ``where`` is of the run with the resume key ``ours``, that of ``settings``.

    Options that the ``saved`` key does not know came later. Their defaults compute what was computed before them.
    """
    retrieval.require_same(where, ours, config.completed_resume_key(type(settings), saved))


def keep_precision(state: DownstreamState, saved: dict[str, Any]) -> None:
    """Go on in the precision of the ``saved`` resume key, unless one is given by hand. The module reads it at each call."""
    state.precision = state.precision.resumed(saved.get("train.precision"))
    state.module.compute_dtype = state.precision.dtype
    state.resume_key["train.precision"] = state.precision.name


def is_complete(settings: Settings, benchmark: Benchmark) -> bool:
    """Whether the run has its result.

    Raises:
        UserError: it has one, but of other settings, weights or data.
    """
    record = retrieval.read_record(settings.run_dir)
    if record is None:
        return False
    known = record.get(portable.RESUME_KEY, {})
    wanted = settings.train.precision
    name = known.get("train.precision", AUTO) if wanted == AUTO else wanted  # a result stays one on every machine
    where = Path(settings.run_dir) / "result.json"
    require_same(where, settings, resume_key(settings, benchmark, name, known), known)
    return True


def record_of(state: DownstreamState, num_updates: int, *, num_classes: int, **of_head: Any) -> dict[str, Any]:
    """What a checkpoint says of its run, besides tensors. ``of_head`` is what a program says of its head."""
    return {
        "total_steps": state.total_steps,
        "num_updates": num_updates,
        "num_classes": num_classes,
        "init": state.settings.init,
        **of_head,
        "model": state.model_settings,
        "benchmark": state.benchmark.name,
        "root": str(Path(state.benchmark.root).resolve()),
        portable.RESUME_KEY: state.resume_key,
        **state.precision.record(),
        "versions": portable.versions(),
    }


def resume(state: StateT, load: Callable[[StateT, portable.Checkpoint], None]) -> Path | None:
    """Take over the newest valid checkpoint of the run, if there is one. Returns where it lies."""
    found = resume_point.newest_for_all(state.settings.run_dir, **state.settings.checkpoint.resume_arguments())
    if not found:
        return None
    saved = found.read()
    keep_precision(state, saved.state.get(portable.RESUME_KEY, {}))
    require_same(found.path, state.settings, state.resume_key, saved.state.get(portable.RESUME_KEY, {}))
    load(state, saved)
    state.step = saved.step
    found.log_new_moments(state.step, state.total_steps)
    return found.path


def load_engine(engine: Engine, saved: portable.Checkpoint, *, without: tuple[str, ...] = ()) -> None:
    """Take over model and moments of a checkpoint, ``without`` the kinds that are a program's own."""
    tensors = {kind: of_kind for kind, of_kind in saved.tensors.items() if kind not in without}
    engine.load_portable(PortableState(tensors.pop("model"), tensors, saved.state["num_updates"]))


# --- what is said of a run ---


def open_log(state: DownstreamState, program: str, metrics: RankMetrics) -> run_log.RunLog:
    """The first rank's log of the steps to come."""
    return run_log.RunLog(
        state.settings.run_dir,
        is_first=state.world.is_first,
        title=program,
        total_steps=state.total_steps,
        first_step=state.step,
        numbers=metrics.run,
    )


def log_setup(state: DownstreamState, program: str, with_head: str = "") -> None:
    """Record the run's set-up and print the sizes that follow from it. ``with_head`` says what the head is."""
    settings, module = state.settings, state.engine.module
    record_run(state)
    print(f"{program}: {state.precision}")
    if settings.init != RANDOM and not state.step:
        print(f"{program}: {describe_start(state.module.model, settings.init, settings.model.img_size)}")
    millions = sum(p.numel() for p in module.parameters()) / 1e6
    going = f"resuming at step {state.step} of {state.total_steps}" if state.step else f"{state.total_steps} steps"
    print(
        f"{program}: {settings.model.size}{with_head} ({millions:.1f} M parameters) from {settings.init}, {going}, "
        f"peak lr {settings.optim.lr:.3g}, run {settings.run_dir}",
        flush=True,
    )


def record_run(state: DownstreamState) -> None:
    """Write down the run's set-up, and print what its benchmark holds."""
    settings = state.settings
    resolved = config.with_normalisation(settings, state.model_settings["mean"], state.model_settings["std"])
    run_log.record_run(
        settings.run_dir,
        config_yaml=config.dump_yaml(resolved),
        config_hash=config.config_hash(settings),
        seed=settings.seed,
        versions=portable.versions(),
        first_step=state.step,
    )
    described = datasets.describe(state.benchmark)
    print(described.table, described.note, sep="\n")


def log_complete(settings: Settings) -> None:
    """Say that the run has its result already."""
    print(f"{settings.run_dir} is complete: its result is in {Path(settings.run_dir) / 'result.json'}", flush=True)
    print(f"next: {next_command(settings)}", flush=True)


def log_end(settings: Settings, program: str, seconds: float) -> None:
    """Say where the result is, how long that took, and what to do with it."""
    where = f"the result is in {Path(settings.run_dir) / 'result.json'}"
    progress.log_to_stderr(progress.ending(program, seconds, where, next_command(settings)))


def next_command(settings: Settings) -> str:
    """The command that shows the result."""
    return f"personmae report {shlex.quote(str(Path(settings.run_dir).parent))}"


def whitening_of(settings: Settings) -> dict[str, Any] | None:
    """How the features of query and gallery are whitened per camera before they are compared. None where they are not."""
    if not isinstance(settings, config.Unsupervised) or not settings.feature.whiten_retrieval:
        return None
    return {"dim": settings.cluster.whiten_dim, "shrinkage": settings.cluster.whiten_shrinkage}


def evaluate(state: DownstreamState, log: run_log.RunLog, metrics: RankMetrics, stop: dist.StopSignal) -> None:
    """Measure the last epoch, the only one that is measured, and write the record into the run. By all ranks together."""
    settings, kept = state.settings, state.model_settings

    def stopped() -> bool:
        metrics.beat("evaluate", state.step)
        return stop.requested

    features = retrieval.model_features(
        state.module.model,
        mean=kept["mean"],
        std=kept["std"],
        device=state.world.device,
        stopped=stopped,
        trained_steps=state.step,
        log=log.log,
    )
    if whitening := whitening_of(settings):
        features = retrieval.for_each_camera(features, "whiten", **whitening)
    try:
        record = retrieval.measure(
            state.benchmark,
            features,
            img_size=settings.model.img_size,
            num_threads=dist.threads_per_rank(state.world),
            device=state.world.device,
            log=log.log,
            stopped=stopped,
        )
    except Stopped as early:
        stop.settle()
        raise Stopped(f"{early}, all {state.step} steps saved in {settings.run_dir}. Run this again to go on") from None
    if record is None:
        return
    record |= {"name": Path(settings.run_dir).name, "init": settings.init, "commit": environment.git_commit()}
    record |= {portable.RESUME_KEY: state.resume_key, "whiten": whitening_of(settings)}
    retrieval.write_record(Path(settings.run_dir), record)
    log.log(retrieval.table_row(record))
