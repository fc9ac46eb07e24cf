"""Ordinary person crops for measurements: drawn people at the sizes, noise and file sizes of real detections.

    python benchmarks/crops.py OUT [--images 20000]

Crops of 150 to 500 pixels height and about 13 KB, as a detector cuts them from video. The synthetic pool is smaller and
cleaner, so each image is enlarged and given sensor noise. Every image is a pure function of its number.
"""

import argparse
import multiprocessing
import os
import tempfile
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from personmae.data import importer
from personmae.synthetic.image import draw_shot
from personmae.synthetic.plan import Shot, SynthSettings, plan

HEIGHTS = (150, 500)  # pixels, uniform
NOISE = 1.0  # standard deviation in grey levels, of every colour
QUALITY = 95  # what OpenCV writes by default, and LUPerson was written with
CHUNK_IMAGES = 100


def draw(folder: Path, settings: SynthSettings, shots: list[tuple[int, Shot]]) -> None:
    """Write some of the crops."""
    cv2.setNumThreads(1)
    for number, shot in shots:
        image, _ = draw_shot(settings, shot)
        rng = np.random.default_rng(number)
        height = int(rng.integers(HEIGHTS[0], HEIGHTS[1] + 1))
        size = round(height * image.shape[1] / image.shape[0]), height
        enlarged = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(enlarged + rng.normal(0, NOISE, enlarged.shape), 0, 255).astype(np.uint8)
        _, jpeg = cv2.imencode(".jpg", noisy, (cv2.IMWRITE_JPEG_QUALITY, QUALITY))
        (folder / f"{number:07}.jpg").write_bytes(jpeg.tobytes())


def write(out: Path, num_images: int) -> None:
    """Draw crops and write them as shards to ``out``; nothing is done where they are already."""
    if (out / "index.json").exists():
        return
    settings = SynthSettings(pool_images=num_images)
    shots = list(enumerate(shot for shot in plan(settings) if shot.split == "pool"))
    chunks = [shots[start : start + CHUNK_IMAGES] for start in range(0, len(shots), CHUNK_IMAGES)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            pool.map(partial(draw, Path(folder), settings), chunks)
        importer.write(Path(folder), str(out))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    arguments = parser.parse_args()
    write(arguments.out, arguments.images)
