"""The loop of most scripts: files by Pillow in a DataLoader with one worker a core, and one network, to one file of features.

    python benchmarks/plain_extract.py LIST OUT --img-size 256 128 --model FOLDER_OF_TIMM
    python benchmarks/plain_extract.py LIST OUT --img-size 256 128     # reads, decodes and resizes alone

``extract.py`` measures ``personmae extract`` beside it.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

BATCH = 64


class Crops(Dataset):
    """A file, opened by Pillow, resized, made a tensor, normalised."""

    def __init__(self, paths: list[str], img_size: tuple[int, int]):
        self.paths = paths
        bicubic = transforms.InterpolationMode.BICUBIC
        steps = [transforms.Resize(img_size, bicubic), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def main() -> None:
    """Read a list, write ``OUT`` where there is a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, help="a path a line")
    parser.add_argument("out", type=Path)
    parser.add_argument("--img-size", type=int, nargs=2, required=True, help="height and width in pixels")
    parser.add_argument("--model", help="timm's folder of an export. Nothing is computed without")
    arguments = parser.parse_args()
    paths = arguments.list.read_text(encoding="utf-8").splitlines()
    workers = len(os.sched_getaffinity(0))
    loader = DataLoader(Crops(paths, tuple(arguments.img_size)), batch_size=BATCH, num_workers=workers)
    if not arguments.model:
        for _ in loader:
            pass
        return
    model = timm.create_model(f"local-dir:{arguments.model}", pretrained=True).eval()
    with torch.no_grad():
        rows = [torch.nn.functional.normalize(model(images), dim=1) for images in loader]
    np.save(arguments.out, torch.cat(rows).numpy())


if __name__ == "__main__":
    main()
