"""How long a model takes for an image, alone: without reading, decoding or comparing."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from personmae.monitor import environment

BATCH_SIZE: Final = 32
WARM_UPS: Final = 2  # calls before each series, which are not counted
ROUNDS: Final = 9  # of which the median counts


def measure(
    features: Callable[[Tensor], Tensor],
    *,
    img_size: tuple[int, int],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Milliseconds of one image, images per second of a batch, and on what: the part of a result about latency.

    ``features`` maps normalised fp32 images (B, 3, H, W) to features, on ``device``, in evaluation mode. ``clock`` is in
    seconds.
    """
    one, batch = (_median_seconds(features, torch.rand(n, 3, *img_size, device=device), clock) for n in (1, BATCH_SIZE))
    return {
        "milliseconds": round(1000 * one, 3),
        "images_per_second": round(BATCH_SIZE / batch, 2),
        "batch_size": BATCH_SIZE,
        "rounds": ROUNDS,
        "img_size": list(img_size),
        "precision": "fp32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "hardware": environment.describe_hardware(),
    }


def in_words(record: dict[str, Any]) -> str:
    """A line of a measurement, such as "5.1 ms an image, 310 images/s in batches of 32 (fp32, cpu, 2 threads)"."""
    speed = f"{record['milliseconds']:.1f} ms an image, {record['images_per_second']:,.0f} images/s in batches of"
    return f"{speed} {record['batch_size']} ({record['precision']}, {record['device']}, {record['threads']} threads)"


def _median_seconds(features: Callable[[Tensor], Tensor], images: Tensor, clock: Callable[[], float]) -> float:
    """Of one call. A GPU is waited for on both sides."""

    def timed() -> float:
        _wait(images.device)
        start = clock()
        features(images)
        _wait(images.device)
        return clock() - start

    with torch.no_grad():
        for _ in range(WARM_UPS):
            features(images)
        return statistics.median(timed() for _ in range(ROUNDS))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
