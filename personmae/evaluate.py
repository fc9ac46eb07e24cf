"""A model, frozen features or a baseline, and a benchmark, to mAP, CMC and mINP with the field's protocol."""

import contextlib
import difflib
import os
import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from personmae import dist
from personmae.checkpoint import portable
from personmae.config import RANDOM
from personmae.errors import UserError
from personmae.model.vit import SIZES, VisionTransformer, build_encoder
from personmae.monitor import environment, progress
from personmae.reid import latency, probe, retrieval
from personmae.reid.datasets import Benchmark, describe, load_benchmark, renewed_digest
from personmae.reid.features import Extractor, timed
from personmae.reid.frozen import FrozenRows
from personmae.reid.heads import Neck, Pool, ReIDModel, build_head
from personmae.reid.samples import SPLITS
from personmae.weights import stored

DEFAULT_SIZE, DEFAULT_IMG_SIZE = "base", (256, 128)  # of random weights: those of the configuration's own defaults
BASELINE_SIZE = (128, 64)  # (height, width) in pixels that images are brought to for what is not trained
_IN_WORDS = {"none": "as they are", "standardise": "standardised per camera", "whiten": "whitened per camera"}
_PRETRAINED_ONLY = {"pool": "--pool is for pre-trained encoders", "probe": "--probe is for pre-trained encoders"}


@dataclass(frozen=True, slots=True)
class Options:
    """How features are found and compared.

    ``pool`` takes a pre-trained encoder as it is, its tokens pooled so ("rows" are means of rows of patches). What it finds
    is a lower bound, not a ReID system. ``per_camera`` changes features before they are compared, without labels. Baselines
    are standardised where it is None. ``probe`` has both readings of frozen rows instead. ``latency`` measures the model alone
    too. ``size``, ``img_size`` and ``seed`` are of random weights, which are drawn on the spot.
    """

    pool: Pool | Literal["rows"] | None = None
    per_camera: retrieval.PerCamera | None = None
    probe: bool = False
    rerank: str = "none"
    latency: bool = False
    size: str | None = None
    img_size: tuple[int, int] | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What is evaluated: an extractor with the preprocessing of its weights, in words, and what a record says of its source.

    ``encoder`` is there where it is pre-trained alone, or random.
    """

    name: str
    init: str
    model: Extractor | None
    encoder: VisionTransformer | None
    settings: dict[str, Any]
    source: dict[str, Any]


def run(
    where: str, benchmark_name: str, root: str, *, out: Path | None, options: Options | None = None, unfinished: bool = False
) -> None:
    """Print a row of the table, two of a probe. With ``out`` also write ``result.json`` and ``rank_lists.json`` there.

    ``where`` is a run or a checkpoint, "random", or the name of a baseline. A run whose training has not reached its end is
    taken only with ``unfinished``, or where its checkpoint is named itself. That is logged, and the record has how far it had
    come. The benchmark needs no training images but for a probe.

    Raises:
        UserError: the checkpoint or the benchmark cannot be read, or the options do not go together.
        OSError: ``out`` cannot be written to. Found before anything is computed.
    """
    began, options = time.monotonic(), options or Options()
    _require_known(where)
    _require_fitting(where, options)
    if out:
        _require_writable(out)
    benchmark = load_benchmark(benchmark_name, root, splits=SPLITS if options.probe else ("query", "gallery"))
    described = describe(benchmark)
    print(described.table, described.note, sep="\n")
    if where in retrieval.BASELINES:
        record = _measure_baseline(where, benchmark, options)
    else:
        record = _measure(_find(where, options, unfinished), benchmark, options)
    record |= {"commit": environment.git_commit()}
    _log_domain(record)
    for row in _rows(record):
        print(retrieval.table_row(row))
    if "latency" in record:
        print(f"{record['name']}: {latency.in_words(record['latency'])}")
    if out:
        retrieval.write_record(out, record)
        seconds, where_it_is = time.monotonic() - began, f"the result is in {out / 'result.json'}"
        following = f"personmae report {shlex.quote(os.path.normpath(out / '..'))}"
        progress.log_to_stderr(progress.ending("evaluate", seconds, where_it_is, following))


def _require_known(where: str) -> None:
    """Raise a UserError unless ``where`` exists or is the name of what needs no training, with the nearest such name."""
    names = (*retrieval.BASELINES, RANDOM)
    if where in names or os.path.lexists(where):
        return
    near = difflib.get_close_matches(where, names, n=1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"a run, a checkpoint or one of {', '.join(names)} is required. {where} does not exist{hint}")


def _require_writable(out: Path) -> None:
    """Raise an OSError unless files can be made in ``out``. What had to be made for that is gone afterwards."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # another process may have begun to write there
                folder.rmdir()


def _require_fitting(where: str, options: Options) -> None:
    """Raise a UserError where an option is not for what is evaluated, or not beside another."""
    if where in retrieval.BASELINES:
        for name in ("pool", "probe"):
            if getattr(options, name):
                raise UserError(f"{_PRETRAINED_ONLY[name]}. {where!r} has no tokens: leave it out")
    if options.latency and options.probe:
        raise UserError("--latency is the time of one feature, and --probe reads two: leave one of them out")
    if options.latency and where in retrieval.BASELINES:
        raise UserError(f"--latency is the time of a model. {where!r} has none: leave it out")
    drawn = {"size": options.size, "img-size": options.img_size, "seed": options.seed}
    if where != RANDOM and (given := [f"--{name}" for name, value in drawn.items() if value is not None]):
        raise UserError(f"{', '.join(given)} is for 'random' weights. {where} has its own: leave it out")
    if options.probe and (options.pool or options.per_camera or options.rerank != "none"):
        raise UserError("--probe says itself what is compared. Leave out --pool, --per-camera and --rerank")
    if where == RANDOM and not (options.probe or options.pool):
        raise UserError("'random' weights have no head. Give --probe, or --pool mean, to see what their tokens find")


def _measure_baseline(name: str, benchmark: Benchmark, options: Options) -> dict[str, Any]:
    """The record of a search without any training."""
    how = options.per_camera or "standardise"
    record = retrieval.measure(
        benchmark,
        retrieval.baseline_features(name, how),
        img_size=BASELINE_SIZE,
        num_threads=dist.usable_cores(),
        rerank=options.rerank,
        log=progress.log,
    )
    assert record  # one process
    return record | {"name": name if how == "standardise" else f"{name}, {how}", "init": f"no training, {_IN_WORDS[how]}"}


def _measure(subject: Subject, benchmark: Benchmark, options: Options) -> dict[str, Any]:
    """The record of a search by a model, or of a probe."""
    settings = subject.settings
    device = torch.device("cuda" if dist.use_cuda() else "cpu")
    img_size: tuple[int, int] = tuple(settings["img_size"])
    shared: dict[str, Any] = {"device": device, "num_threads": dist.usable_cores(), "log": progress.log}
    named = {"name": subject.name, "init": subject.init} | subject.source
    if options.probe:
        assert subject.encoder
        encoder, inputs = subject.encoder.to(device), {name: settings[name] for name in ("mean", "std")}
        record = probe.measure(benchmark, encoder, img_size=img_size, **inputs, **shared)
        named |= {"name": f"{subject.name}, rows"}
    else:
        model = subject.model
        assert isinstance(model, torch.nn.Module)
        features = retrieval.model_features(
            model.to(device), mean=settings["mean"], std=settings["std"], device=device, log=progress.log
        )
        if whitening := subject.source.get("whiten"):
            features = retrieval.for_each_camera(features, "whiten", **whitening)
        elif (how := options.per_camera or "none") != "none":
            features = retrieval.for_each_camera(features, how)
            named["init"] += f", {_IN_WORDS[how]}"
        record = retrieval.measure(benchmark, features, img_size=img_size, rerank=options.rerank, **shared)
        if options.latency:
            with timed(progress.log, "measuring the time of the model alone"):
                named["latency"] = latency.measure(model.features, img_size=img_size, device=device)
    assert record  # one process
    return record | named


def _rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What is printed: the record itself, and beside a probe's rows its discriminants."""
    if "probe" not in record:
        return [record]
    name = record["name"].removesuffix(", rows")
    return [record, record | record["probe"]["lda"] | {"name": f"{name}, LDA"}]


def _find(where: str, options: Options, unfinished: bool) -> Subject:
    """The model at ``where``, or one of random weights.

    Raises:
        UserError: there is none, it is not finished, or it is not of the kind that the options are for.
    """
    if where == RANDOM:
        return _draw(options)
    if (Path(where) / stored.DESCRIPTION).is_file():
        raise UserError(
            f"a run or one of its checkpoints is required. {where} is an exported folder: name the run it came from"
        )
    path = portable.locate(where)
    if not unfinished:
        portable.require_finished(where, path, " give --unfinished,")
    source = {"checkpoint": str(path), "step": portable.step_of(path.name), "digest": portable.digest(path)}
    source["run"] = os.path.abspath(portable.run_of(path))
    if reached := portable.unfinished(path):
        source["unfinished"] = reached
    progress.log(f"evaluating {path}" + (f", whose run is not finished: it is at {reached}" if reached else ""))
    name, record = Path(where).name, portable.read_state(path)
    if "head" in record:
        for option, refusal in _PRETRAINED_ONLY.items():
            if getattr(options, option):
                raise UserError(f"{refusal}. {path} is fine-tuned and has a head of its own: leave it out")
        source["trained_on"] = _trained_on(source["run"], record)
        if record.get("whiten") and not options.per_camera:
            source["whiten"] = record["whiten"]  # as the run was evaluated at its own end
        model = load_model(portable.read(path, moments=False), path)
        return Subject(name, record["init"], model, None, record["model"], source)
    if not (options.pool or options.probe):
        raise UserError(
            f"a fine-tuned checkpoint is required. {path} is pre-trained only: run 'personmae finetune' first, or see with "
            "--probe, or --pool mean, what its features find without"
        )
    weights, settings = portable.read_encoder(path)
    encoder = build_encoder(settings)
    portable.load_strictly(encoder, weights, path)
    return _frozen(name, where, encoder, settings, options, source)


def _trained_on(run_dir: str, state: dict[str, Any]) -> dict[str, Any]:
    """Which data a run with a head was trained on, as far as that is known.

    ``benchmark_digest`` and ``benchmark_title`` are of the test set that belongs to its training images.
    """
    key, own = state.get(portable.RESUME_KEY, {}), retrieval.read_record(run_dir) or {}
    data = {
        "benchmark": state.get("benchmark"),
        "root": state.get("root"),
        **{name: key.get(f"data.{name}") for name in ("num_images", "num_ids", "digest")},
        **{name: own.get(name) for name in ("benchmark_digest", "benchmark_title")},
        "labels": "cluster.eps" not in key,
    }
    return {name: value for name, value in data.items() if value is not None}


def _log_domain(record: dict[str, Any]) -> None:
    """Log that a model is tested on other data than it was trained on. An earlier digest in the record is renewed."""
    data = record.get("trained_on", {})
    if data.get("benchmark_digest", record["benchmark_digest"]) == record["benchmark_digest"]:
        return
    data["benchmark_digest"] = renewed_digest(data["benchmark_digest"], data.get("benchmark"), data.get("root", ""))
    if data["benchmark_digest"] != record["benchmark_digest"]:
        title = data.get("benchmark_title") or data["benchmark"]
        progress.log(f"zero shot: {record['name']} was trained on {title} and is tested on {record['benchmark_title']}")


def _draw(options: Options) -> Subject:
    """Random weights: what features of the same kind find without any training."""
    size, img_size, seed = options.size or DEFAULT_SIZE, options.img_size or DEFAULT_IMG_SIZE, options.seed or 0
    torch.manual_seed(seed)
    encoder = VisionTransformer(**SIZES[size])
    if any(side % encoder.patch_size for side in img_size):
        raise UserError(f"--img-size must be multiples of {encoder.patch_size} pixels. Got {img_size[0]}x{img_size[1]}")
    settings = {"img_size": img_size, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    start = f"random {size}, seed {seed}"
    return _frozen(RANDOM, start, encoder, settings, options, {"random": {"size": size, "img_size": img_size, "seed": seed}})


def _frozen(
    name: str, start: str, encoder: VisionTransformer, settings: dict[str, Any], options: Options, source: dict[str, Any]
) -> Subject:
    """An encoder as it is, its tokens pooled or read by a probe."""
    encoder.eval()
    img_size = tuple(settings["img_size"])
    if options.probe:
        return Subject(name, f"{start}, frozen, rows whitened per camera", None, encoder, settings, source)
    if options.pool == "rows":
        return Subject(name, f"{start}, middle rows of its tokens", FrozenRows(encoder, img_size), encoder, settings, source)
    assert options.pool  # or it would have been refused
    model = ReIDModel(encoder, Neck(encoder, pool=options.pool)).eval()
    return Subject(name, f"{start}, {options.pool} of its tokens", model, encoder, settings, source)


def load_model(saved: portable.Checkpoint, path: Path) -> ReIDModel:
    """The model of a fine-tuned checkpoint, in evaluation mode."""
    settings: dict[str, Any] = saved.state["model"]
    encoder = build_encoder(settings)
    model = ReIDModel(encoder, build_head(encoder, saved.state["num_classes"], **saved.state["head"]))
    weights = {name.removeprefix("model."): tensor for name, tensor in saved.tensors["model"].items()}
    portable.load_strictly(model, weights, path)
    return model.eval()
