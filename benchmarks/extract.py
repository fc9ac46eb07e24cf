"""Images a second of ``personmae extract`` beside a plain loop of torch, Pillow and a DataLoader, on the same files.

    python benchmarks/extract.py                          # a quarter of an hour on 2 idle CPU cores
    python benchmarks/extract.py --work DIR --rounds 1

Draws crops of 150 to 500 pixels height as JPEG files, and makes models of random weights: the quickstart's size, for which
reading and decoding is most of the work, and a ViT-S, for which it is little. The ways run in turn. Each is timed from its
call to its file of features, with the start of its processes. Writes ``benchmarks/results/extract.json``.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import crops
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from personmae import dist
from personmae.checkpoint import portable
from personmae.model.vit import SIZES, VisionTransformer
from personmae.monitor import environment
from personmae.reid.heads import ReIDModel, build_head
from personmae.synthetic.plan import SynthSettings, plan
from personmae.weights import export, extract, stored
from personmae.weights.encoder import load
from personmae.weights.stored import Stored

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "extract.json"
MODELS = {"micro": ((128, 64), 20_000), "small": ((256, 128), 1_500)}  # (height, width) in pixels, and images
BATCH = 64


def draw(folder: Path, num_images: int) -> None:
    """Write JPEG files of crops. Nothing is done where they are already."""
    if len(list(folder.glob("*.jpg"))) == num_images:
        return
    folder.mkdir(parents=True, exist_ok=True)
    settings = SynthSettings(pool_images=num_images)
    shots = list(enumerate(shot for shot in plan(settings) if shot.split == "pool"))
    chunks = [shots[start : start + 100] for start in range(0, len(shots), 100)]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.map(partial(crops.draw, folder, settings), chunks)


def make_model(folder: Path, size: str, img_size: tuple[int, int]) -> None:
    """A model of random weights, as a folder that ``load`` reads, with timm's beside it."""
    torch.manual_seed(0)
    encoder = VisionTransformer(**SIZES[size])
    model = ReIDModel(encoder, build_head(encoder, 1, kind="bnneck"))
    settings = {"size": size, "img_size": img_size, "patch_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    about = {"num_classes": 1}
    plain = Stored("random weights", settings, model.state_dict(), head={"kind": "bnneck"}, about=about)
    with tempfile.TemporaryDirectory() as made:
        stored.write_folder(Path(made), plain)
        export.run(made, folder, formats=["timm"])


class Crops(Dataset):
    """What most scripts have: a file, opened by Pillow, resized, made a tensor, normalised."""

    def __init__(self, paths: list[Path], img_size: tuple[int, int]):
        self.paths = paths
        bicubic = transforms.InterpolationMode.BICUBIC
        steps = [transforms.Resize(img_size, bicubic), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def plain_loop(model: torch.nn.Module, paths: list[Path], img_size: tuple[int, int], out: Path) -> None:
    """The loop of most scripts, with one worker a core. The features go to a file too."""
    loader = DataLoader(Crops(paths, img_size), batch_size=BATCH, num_workers=dist.usable_cores())
    device = next(model.parameters()).device
    with torch.no_grad():
        rows = [torch.nn.functional.normalize(model(images.to(device)), dim=1).cpu() for images in loader]
    np.save(out, torch.cat(rows).numpy())


def timed(way: Callable[[Path], object], out: Path) -> float:
    """Seconds of one way."""
    out.unlink(missing_ok=True)
    out.with_name(f"{out.stem}.ids.txt").unlink(missing_ok=True)
    began = time.monotonic()
    way(out)
    return time.monotonic() - began


def measure(size: str, work: Path, rounds: int, most_images: int) -> dict[str, Any]:
    """All ways on one model, in turn."""
    import timm

    img_size, num_images = MODELS[size][0], min(MODELS[size][1], most_images)
    draw(work / "crops", min(max(count for _, count in MODELS.values()), most_images))
    if not (work / size).exists():
        make_model(work / size, size, img_size)
    paths = sorted((work / "crops").glob("*.jpg"))[:num_images]
    (work / f"{size}.txt").write_text("\n".join(map(str, paths)), encoding="utf-8")
    ours, theirs = load(work / size), timm.create_model(f"local-dir:{work / size / 'timm'}", pretrained=True).eval()
    run = partial(extract.run, str(work / f"{size}.txt"), model=str(work / size))
    ways: dict[str, Callable[[Path], object]] = {
        "plain loop, our ViT": lambda out: plain_loop(ours.model, paths, img_size, out),
        "plain loop, timm's ViT": lambda out: plain_loop(theirs.to(ours.device), paths, img_size, out),
        "extract, fp32": lambda out: run(out),
        "extract, bf16": lambda out: run(out, precision="bf16"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way, work / "features.npy"))
            print(f"{size}, round {number + 1}: {name}: {num_images / seconds[name][-1]:,.0f} images/s", flush=True)
    rates = {name: [num_images / each for each in found] for name, found in seconds.items()}
    medians = {name: statistics.median(found) for name, found in rates.items()}
    fastest = max(medians[name] for name in medians if name.startswith("plain"))
    return {
        "img_size": img_size,
        "num_images": num_images,
        "images_per_second": rates,
        "median": medians,
        "times_the_faster_plain_loop": {name: medians[name] / fastest for name in medians if name.startswith("extract")},
    }


def main() -> None:
    """Draw, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "bench" / "extract", help="where crops and models are kept"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default=",".join(MODELS), help="of the models")
    parser.add_argument("--most-images", type=int, default=1 << 30, help="fewer than usual, to try this script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the record is written")
    parser.add_argument("--beside", default="nothing", help="what else runs on this machine, for the record")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "commit": environment.git_commit(),
        "hardware": environment.describe_hardware(),
        "versions": portable.versions(),
        "running_beside": arguments.beside,
        "rounds": arguments.rounds,
        "models": {
            size: measure(size, arguments.work.resolve(), arguments.rounds, arguments.most_images)
            for size in arguments.sizes.split(",")
        },
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for size, found in record["models"].items():
        for name, times in found["times_the_faster_plain_loop"].items():
            print(f"{size}: {name}: {found['median'][name]:,.0f} images/s, {times:.2f} times the faster plain loop")


if __name__ == "__main__":
    main()
