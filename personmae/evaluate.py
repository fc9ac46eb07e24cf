"""A fine-tuned checkpoint and a benchmark to mAP, CMC and mINP, with the field's protocol."""

from pathlib import Path
from typing import Any

import torch

from personmae import checkpoint, dist, metrics
from personmae.errors import UserError
from personmae.model.vit import SIZES, VisionTransformer
from personmae.reid import retrieval
from personmae.reid.datasets import describe, load_benchmark
from personmae.reid.heads import ReIDModel, build_head

HISTOGRAM = "histogram"
HISTOGRAM_SIZE = (128, 64)  # (height, width) in pixels the pictures are brought to


def run(where: str, benchmark_name: str, root: str, *, out: Path | None) -> None:
    """Print one row of the table; with ``out`` also write ``result.json`` and ``rank_lists.json`` there.

    Raises:
        UserError: the checkpoint or the benchmark cannot be read.
    """
    benchmark = load_benchmark(benchmark_name, root)
    described = describe(benchmark)
    print(described.table, described.note, sep="\n")
    num_threads = dist.usable_cores()
    if where == HISTOGRAM:
        name, init = "colour histogram", "colour alone, normalised per camera"
        record = retrieval.measure(benchmark, retrieval.histogram_features, img_size=HISTOGRAM_SIZE, num_threads=num_threads)
    else:
        path = checkpoint.locate(where)
        saved = checkpoint.read(path)
        if "head" not in saved.state:
            raise UserError(f"a fine-tuned checkpoint is required; {path} is pre-trained only: run 'personmae finetune' first")
        name, init = Path(where).name, saved.state["init"]
        device = torch.device("cuda" if dist.use_cuda() else "cpu")
        model = load_model(saved, path).to(device)
        settings = saved.state["model"]
        features = retrieval.model_features(model, mean=settings["mean"], std=settings["std"], device=device)
        record = retrieval.measure(benchmark, features, img_size=tuple(settings["img_size"]), num_threads=num_threads)
    record |= {"name": name, "init": init, "commit": metrics.git_commit()}
    print(retrieval.table_row(record))
    if out:
        retrieval.write_record(out, record)


def load_model(saved: checkpoint.Checkpoint, path: Path) -> ReIDModel:
    """The model of a fine-tuned checkpoint, in evaluation mode."""
    settings: dict[str, Any] = saved.state["model"]
    encoder = VisionTransformer(**SIZES[settings["size"]], patch_size=settings["patch_size"])
    model = ReIDModel(encoder, build_head(encoder, saved.state["num_classes"], **saved.state["head"]))
    weights = {name.removeprefix("model."): tensor for name, tensor in saved.tensors["model"].items()}
    checkpoint.load_strictly(model, weights, path)
    return model.eval()
