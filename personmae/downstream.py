"""What supervised and unsupervised training on a benchmark share: images, what a run is known by, its end."""

import shlex
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from personmae import config, dist
from personmae.checkpoint import portable
from personmae.config import RANDOM
from personmae.errors import Stopped
from personmae.monitor import environment, progress, run_log
from personmae.monitor.rank_metrics import RankMetrics
from personmae.precision import AUTO, Precision
from personmae.reid import datasets, retrieval
from personmae.reid.datasets import Benchmark
from personmae.reid.heads import ReIDModel
from personmae.reid.transforms import augment, draw_augmentation

Settings = config.Finetune | config.Unsupervised


class Trained(Protocol):
    """A module with a ReID model in it."""

    model: ReIDModel
    compute_dtype: torch.dtype


class DownstreamState(Protocol):
    """What both programs know of a run."""

    step: int
    model_settings: dict[str, Any]
    identity: dict[str, Any]
    precision: Precision

    @property
    def settings(self) -> Settings: ...
    @property
    def world(self) -> dist.World: ...
    @property
    def benchmark(self) -> Benchmark: ...
    @property
    def module(self) -> Trained: ...


def augmented(state: DownstreamState, images: Tensor, batch_size: int, ours: slice) -> Tensor:
    """This rank's images of a global batch, augmented on its device; drop path is seeded too, so a resumed run repeats it."""
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


def identity(settings: Settings, benchmark: Benchmark, precision: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """What must agree before a run is resumed: settings, what ``auto`` came to, the first weights, the training images.

    Where the weights are gone, they are taken to be those of the ``known`` identity.
    """
    init = settings.init
    if init != RANDOM:
        gone = known and not Path(init).exists()
        init = known.get("init") if known and gone else portable.digest(portable.locate(init))
    return settings.resume_key() | {"train.precision": precision, "init": init} | datasets.resume_key(benchmark)


def require_same(where: str | Path, settings: Settings, ours: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise a UserError unless what lies at ``where`` is of the run with the identity ``ours``, which is that of ``settings``.

    Options that the ``saved`` identity does not know came later; their defaults compute what was computed before them.
    """
    retrieval.require_same(where, ours, config.completed_resume_key(type(settings), saved))


def keep_precision(state: DownstreamState, saved: dict[str, Any]) -> None:
    """Go on in the precision of the ``saved`` identity, unless one is given by hand; the module reads it at each call."""
    state.precision = state.precision.resumed(saved.get("train.precision"))
    state.module.compute_dtype = state.precision.dtype
    state.identity["train.precision"] = state.precision.name


def is_complete(settings: Settings, benchmark: Benchmark) -> bool:
    """Whether the run has its result.

    Raises:
        UserError: it has one, but of other settings, weights or data.
    """
    record = retrieval.read_record(settings.run_dir)
    if record is None:
        return False
    known = record.get("identity", {})
    wanted = settings.train.precision
    precision = known.get("train.precision", AUTO) if wanted == AUTO else wanted  # a result stays one on every machine
    where = Path(settings.run_dir) / "result.json"
    require_same(where, settings, identity(settings, benchmark, precision, known), known)
    return True


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


def tell_complete(settings: Settings) -> None:
    """Say that the run has its result already."""
    print(f"{settings.run_dir} is complete: its result is in {Path(settings.run_dir) / 'result.json'}", flush=True)
    print(f"next: {following(settings)}", flush=True)


def tell_end(settings: Settings, program: str, seconds: float) -> None:
    """Say where the result is, how long that took, and what to do with it."""
    where = f"the result is in {Path(settings.run_dir) / 'result.json'}"
    progress.log_to_stderr(progress.ending(program, seconds, where, following(settings)))


def following(settings: Settings) -> str:
    """The command that shows the result."""
    return f"personmae report {shlex.quote(str(Path(settings.run_dir).parent))}"


def whitening_of(settings: Settings) -> dict[str, Any] | None:
    """How the features of query and gallery are whitened per camera before they are compared; None where they are not."""
    if not isinstance(settings, config.Unsupervised) or not settings.feature.whiten_retrieval:
        return None
    return {"dim": settings.cluster.whiten_dim, "shrinkage": settings.cluster.whiten_shrinkage}


def evaluate(state: DownstreamState, log: run_log.RunLog, metrics: RankMetrics, stop: dist.StopSignal) -> None:
    """Measure the last epoch, the only one that is measured, and write the record into the run; by all ranks together."""
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
        raise Stopped(f"{early}, all {state.step} steps saved in {settings.run_dir}; run this again to go on") from None
    if record is None:
        return
    record |= {"name": Path(settings.run_dir).name, "init": settings.init, "commit": environment.git_commit()}
    record |= {"identity": state.identity, "whiten": whitening_of(settings)}
    retrieval.write_record(Path(settings.run_dir), record)
    log.log(retrieval.table_row(record))
