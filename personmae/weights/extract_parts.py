"""One part of an extraction, computed by any process: images are decoded on threads while the network works on those before.

A part's file is written once and whole. What is in it depends on the images, the model and the settings alone, not on the
number of processes, since each computes with one thread.
"""

import functools
import io
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from personmae import dist
from personmae.data.rejects import Reject
from personmae.images import BadImage
from personmae.reid.transforms import fitted, normalise
from personmae.system import files
from personmae.weights.encoder import Encoder
from personmae.weights.extract_images import Images
from personmae.weights.loading import load_for_command

PART_IMAGES: Final = 256
_AHEAD: Final = 2  # batches that are being decoded while the network works


@dataclass(frozen=True, slots=True)
class Settings:
    """What computes: the model's place, the device, bf16 or fp32, and how many images and decoding threads at a time."""

    model: str
    device: str
    precision: str
    batch_size: int
    num_threads: int
    unfinished: bool = False


class Task(NamedTuple):
    """A part to compute, and the file to write it to."""

    settings: Settings
    images: Images
    path: Path


class PartResult(NamedTuple):
    """Features of the images that could be read, which ones these are, and what is known of the others."""

    features: Float[np.ndarray, "n D"]
    kept: Bool[np.ndarray, " N"]
    rejects: list[Reject]


def write_part(task: Task) -> int:
    """Compute a part and write its file. Returns the number of its images.

    Raises:
        UserError: the source has gone or fails, or the model cannot be read.
        OSError: the file cannot be written.
    """
    with closing(task.images):
        result = compute(task.settings, task.images)
    content = io.BytesIO()
    np.savez(content, features=result.features, kept=result.kept, rejects=np.array(json.dumps(result.rejects)))
    files.replace(task.path, content.getvalue())
    return len(result.kept)


def read_part(path: Path) -> PartResult:
    """What ``write_part`` wrote."""
    with np.load(path) as part:
        return PartResult(part["features"], part["kept"], json.loads(str(part["rejects"])))


def read_rejects(path: Path) -> list[Reject]:
    """What a part has left out, without its features."""
    with np.load(path) as part:
        return json.loads(str(part["rejects"]))


def compute(settings: Settings, images: Images) -> PartResult:
    """Features of all images, in order, fp32 and of length one."""
    encoder = _encoder(settings.model, settings.device, settings.unfinished)
    kept, rejects, rows = np.zeros(len(images.ids), bool), [], [np.empty((0, encoder.config["dim"]), np.float32)]
    cv2.setNumThreads(1)
    with _one_thread(settings.device), ThreadPoolExecutor(settings.num_threads) as pool:
        for batch, ready in decoded(images, encoder.config["size"], settings.batch_size, pool):
            whole = [pixels for pixels in ready if isinstance(pixels, np.ndarray)]
            kept[batch.start : batch.stop] = [isinstance(pixels, np.ndarray) for pixels in ready]
            rejects += [reject for reject in ready if isinstance(reject, dict)]
            if whole:
                rows.append(_features(encoder, np.stack(whole), settings.precision))
    return PartResult(np.concatenate(rows), kept, rejects)


def _features(encoder: Encoder, pixels: UInt8[np.ndarray, "B 3 H W"], precision: str) -> Float[np.ndarray, "B D"]:
    config, device = encoder.config, encoder.device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        images = normalise(torch.from_numpy(pixels).to(device), config["mean"], config["std"])
        return encoder.model(images).float().cpu().numpy()


def decoded(
    images: Images, size: tuple[int, int], batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[range, list[np.ndarray | Reject]]]:
    """Batches of images, resized, and what is wrong with those that cannot be read. A few batches are decoded ahead."""
    ids = images.ids
    starts = iter(range(0, len(ids), batch_size))

    def submit(start: int) -> tuple[range, list[Future]]:
        batch = range(start, min(start + batch_size, len(ids)))
        return batch, [pool.submit(_pixels, images, number, ids[number], size) for number in batch]

    coming = [submit(start) for start in itertools.islice(starts, _AHEAD)]
    while coming:
        batch, futures = coming.pop(0)
        ready = [future.result() for future in futures]
        coming += [submit(start) for start in itertools.islice(starts, 1)]
        yield batch, ready


def _pixels(images: Images, number: int, name: str, size: tuple[int, int]) -> np.ndarray | Reject:
    try:
        if "\n" in name:  # lists of ids have one a line
            raise BadImage("a line break is in its name: rename it", "a line break in the name")
        return fitted(images.pixels(number), size)
    except BadImage as error:
        return {"key": name, "reason": str(error), "kind": error.kind}


@functools.lru_cache(maxsize=1)
def _encoder(model: str, device: str, unfinished: bool) -> Encoder:
    """This process's model, read once."""
    if device == "cpu":
        dist.keep_freed_memory()  # a batch's activations are new each time
    return load_for_command(model, lambda _: None, device=device, unfinished=unfinished)


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """Compute with one thread on a CPU: other processes have the other cores, and results do not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
