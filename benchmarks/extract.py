"""Images a second of ``personmae extract`` beside a plain loop of torch, Pillow and a DataLoader, on the same files.

    python benchmarks/extract.py                          # a quarter of an hour on 2 idle CPU cores
    python benchmarks/extract.py --work DIR --rounds 1

Draws crops of 150 to 500 pixels height as JPEG files, and makes models of random weights: the quickstart's size, for which
reading and decoding is most of the work, and a ViT-S, for which it is little. The ways run in turn, each as the command that
a user types, timed from its start to its file of features. Two more only read, decode and resize, as when the network is on
a GPU. A list of one image says what a command costs before its first. Writes ``benchmarks/results/extract.json``.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import crops
import numpy as np

from personmae import dist
from personmae.checkpoint import portable
from personmae.data.import_workers import workers
from personmae.monitor import environment
from personmae.synthetic.plan import SynthSettings, plan
from personmae.weights.extract_images import Images, open_images
from personmae.weights.extract_parts import PART_IMAGES, decoded

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "extract.json"
MODELS = {"micro": ((128, 64), 20_000), "small": ((256, 128), 1_000)}  # (height, width) in pixels, and images
BATCH = 64
PLAIN, READING = "plain loop", "reading alone"


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
    import torch

    from personmae.model.vit import SIZES, VisionTransformer
    from personmae.reid.heads import ReIDModel, build_head
    from personmae.weights import export, stored

    torch.manual_seed(0)
    encoder = VisionTransformer(**SIZES[size])
    model = ReIDModel(encoder, build_head(encoder, 1, kind="bnneck"))
    settings = {"size": size, "img_size": img_size, "patch_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    plain = stored.Stored("random weights", settings, model.state_dict(), head={"kind": "bnneck"}, about={"num_classes": 1})
    with tempfile.TemporaryDirectory() as made:
        stored.write_folder(Path(made), plain)
        export.run(made, folder, formats=["timm"])


def commands(size: str, work: Path, images: Path, read: Path) -> dict[str, list[str]]:
    """The ways as a user types them, by name. Those that only read have a list of their own, for they are fast."""
    out, model = str(work / "features.npy"), str(work / size)
    img_size = [str(side) for side in MODELS[size][0]]
    plain = [sys.executable, str(ROOT / "benchmarks" / "plain_extract.py"), str(images), out, "--img-size", *img_size]
    ours = [sys.executable, "-m", "personmae", "extract", str(images), out, "--model", model]
    return {
        PLAIN: [*plain, "--model", f"{model}/timm"],
        "extract, fp32": ours,
        "extract, bf16": [*ours, "--precision", "bf16"],
        f"{PLAIN}, {READING}": [str(read) if part == str(images) else part for part in plain],
        f"extract, {READING}": [sys.executable, __file__, "--read", str(read), *img_size],
    }


def timed(command: list[str], work: Path) -> float:
    """Seconds of one way."""
    for left in work.glob("features*"):  # of the run before, which may have been killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return time.monotonic() - began


def measure(size: str, work: Path, rounds: int, most_images: int) -> dict[str, Any]:
    """All ways on one model, in turn."""
    img_size, num_images = MODELS[size][0], min(MODELS[size][1], most_images)
    draw(work / "crops", min(max(count for _, count in MODELS.values()), most_images))
    if not (work / size).exists():
        make_model(work / size, size, img_size)
    paths = [str(path) for path in sorted((work / "crops").glob("*.jpg"))]
    lists = {name: work / f"{name}.txt" for name in ("one", "some", "all")}
    for listed, count in zip(lists.values(), (1, num_images, len(paths)), strict=True):
        listed.write_text("\n".join(paths[:count]), encoding="utf-8")
    starts = {name: timed(command, work) for name, command in commands(size, work, lists["one"], lists["one"]).items()}
    counts = {name: len(paths) if name.endswith(READING) else num_images for name in starts}
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for number in range(rounds):
        for name, command in commands(size, work, lists["some"], lists["all"]).items():
            seconds[name].append(timed(command, work))
            print(f"{size}, round {number + 1}: {name}: {counts[name] / seconds[name][-1]:,.0f} images/s", flush=True)
    rates = {name: [counts[name] / each for each in found] for name, found in seconds.items()}
    medians = {name: statistics.median(found) for name, found in rates.items()}
    beside = {name: f"{PLAIN}, {READING}" if name.endswith(READING) else PLAIN for name in medians}
    return {
        "img_size": img_size,
        "num_images": counts,
        "seconds_of_one_image": starts,
        "images_per_second": rates,
        "median": medians,
        "times_the_plain_loop": {name: medians[name] / medians[beside[name]] for name in medians if name != beside[name]},
    }


def read(listed: str, img_size: tuple[int, int]) -> None:
    """Read, decode and resize by processes as ``extract`` has them, without a network."""
    images, cores = open_images(listed), dist.usable_cores()
    parts = [range(start, start + PART_IMAGES) for start in range(0, len(images.ids), PART_IMAGES)]
    with workers(cores, preload="personmae.weights.extract_parts") as pool:
        for future in [pool.submit(_read_part, images.part(part), img_size) for part in parts]:
            future.result()


def _read_part(images: Images, img_size: tuple[int, int]) -> None:
    with ThreadPoolExecutor(1) as pool:
        for _, ready in decoded(images, img_size, BATCH, pool):
            np.stack([pixels for pixels in ready if isinstance(pixels, np.ndarray)])


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
    parser.add_argument("--read", nargs=3, metavar=("LIST", "HEIGHT", "WIDTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        return read(arguments.read[0], (int(arguments.read[1]), int(arguments.read[2])))
    arguments.work.mkdir(parents=True, exist_ok=True)
    models = {
        size: measure(size, arguments.work.resolve(), arguments.rounds, arguments.most_images)
        for size in arguments.sizes.split(",")
    }
    record = {
        "commit": environment.git_commit(),
        "hardware": environment.describe_hardware(),
        "versions": portable.versions(),
        "running_beside": arguments.beside,
        "rounds": arguments.rounds,
        "models": models,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for size, found in models.items():
        for name, times in found["times_the_plain_loop"].items():
            print(f"{size}: {name}: {found['median'][name]:,.0f} images/s, {times:.2f} times the plain loop")
    return None


if __name__ == "__main__":
    main()
