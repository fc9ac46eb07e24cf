"""A fine-tuned checkpoint and a benchmark to mAP, CMC and mINP, with the field's protocol."""

import shlex
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from personmae import checkpoint, dist, metrics, progress
from personmae.errors import UserError
from personmae.model.vit import SIZES, VisionTransformer
from personmae.reid import retrieval
from personmae.reid.datasets import describe, load_benchmark
from personmae.reid.heads import Neck, Pool, ReIDModel, build_head, trained_size

HISTOGRAM = "histogram"
HISTOGRAM_SIZE = (128, 64)  # (height, width) in pixels the pictures are brought to


def run(
    where: str,
    benchmark_name: str,
    root: str,
    *,
    out: Path | None,
    pool: Pool | None = None,
    rerank: str = "none",
    unfinished: bool = False,
) -> None:
    """Print one row of the table; with ``out`` also write ``result.json`` and ``rank_lists.json`` there.

    ``pool`` takes a pre-trained encoder as it is, its tokens pooled so; what it finds is a lower bound, not a ReID system.
    A run whose training has not reached its end is taken only with ``unfinished``, or where its checkpoint is named itself;
    that is told, and the record has how far it had come.
    The benchmark needs no training pictures.

    Raises:
        UserError: the checkpoint or the benchmark cannot be read.
        OSError: ``out`` cannot be written to; found before anything is computed.
    """
    began = time.monotonic()
    if where == HISTOGRAM and pool:
        raise UserError("--pool is for pre-trained encoders; 'histogram' has no tokens: leave it out")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    benchmark = load_benchmark(benchmark_name, root, splits=("query", "gallery"))
    described = describe(benchmark)
    print(described.table, described.note, sep="\n")
    num_threads = dist.usable_cores()
    if where == HISTOGRAM:
        name, init = "colour histogram", "colour alone, normalised per camera"
        source: dict[str, Any] = {}
        record = retrieval.measure(
            benchmark,
            retrieval.histogram_features,
            img_size=HISTOGRAM_SIZE,
            num_threads=num_threads,
            rerank=rerank,
            say=progress.log,
        )
    else:
        path = checkpoint.locate(where)
        if not unfinished:
            checkpoint.require_finished(where, path, " give --unfinished,")
        model, settings, init = load(where, path, pool)
        name = Path(where).name
        source = {"checkpoint": str(path), "step": checkpoint.step_of(path.name), "digest": checkpoint.digest(path)}
        if reached := checkpoint.unfinished(path):
            source["unfinished"] = reached
        progress.log(f"evaluating {path}" + (f", whose run is not finished: it is at {reached}" if reached else ""))
        device = torch.device("cuda" if dist.use_cuda() else "cpu")
        features = retrieval.model_features(
            model.to(device), mean=settings["mean"], std=settings["std"], device=device, say=progress.log
        )
        record = retrieval.measure(
            benchmark,
            features,
            img_size=tuple(settings["img_size"]),
            num_threads=num_threads,
            device=device,
            rerank=rerank,
            say=progress.log,
        )
    assert record  # one process
    record |= {"name": name, "init": init, "commit": metrics.git_commit()} | source
    print(retrieval.table_row(record))
    if out:
        retrieval.write_record(out, record)
        seconds, where = time.monotonic() - began, f"the result is in {out / 'result.json'}"
        following = f"personmae report {shlex.quote(str(out.resolve().parent))}"
        progress.say(progress.ending("evaluate", seconds, where, following))


def load(where: str, path: Path, pool: Pool | None = None) -> tuple[ReIDModel, dict[str, Any], str]:
    """The model of a checkpoint in evaluation mode, the settings that belong to its weights, and what it was trained from.

    ``path`` is the checkpoint that ``where`` names.

    Raises:
        UserError: it is a pre-trained one without ``pool``, or a fine-tuned one with it.
    """
    record = checkpoint.read_state(path)
    if "head" in record:
        if pool:
            raise UserError(f"--pool is for pre-trained encoders; {path} is fine-tuned and has a head of its own: leave it out")
        return load_model(checkpoint.read(path, moments=False), path), record["model"], record["init"]
    if not pool:
        raise UserError(
            f"a fine-tuned checkpoint is required; {path} is pre-trained only: run 'personmae finetune' first, or see with "
            "--pool mean what its features find without"
        )
    weights, settings = checkpoint.read_encoder(path)
    encoder = VisionTransformer(**SIZES[settings["size"]], patch_size=settings["patch_size"])
    checkpoint.load_strictly(encoder, weights, path)
    return ReIDModel(encoder, Neck(encoder, pool=pool)).eval(), settings, f"{where}, {pool} of its tokens"


def load_model(saved: checkpoint.Checkpoint, path: Path) -> ReIDModel:
    """The model of a fine-tuned checkpoint, in evaluation mode."""
    settings: dict[str, Any] = saved.state["model"]
    encoder = VisionTransformer(**SIZES[settings["size"]], patch_size=settings["patch_size"])
    head = build_head(encoder, saved.state["num_classes"], **saved.state["head"])
    model = ReIDModel(encoder, head, trained_size=trained_size(settings))
    weights = {name.removeprefix("model."): tensor for name, tensor in saved.tensors["model"].items()}
    checkpoint.load_strictly(model, weights, path)
    return model.eval()
