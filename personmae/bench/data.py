"""``personmae bench data``: how fast the shards of a data set are read and decoded, next to a baseline that does the same."""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from rich.console import Console
from rich.table import Table

from personmae import dist
from personmae.checkpoint import portable
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader, JpegReader
from personmae.errors import UserError
from personmae.model.inputs import RegionSpec, prepare_batch
from personmae.monitor import environment, progress
from personmae.system import files, signals

IMG_SIZE = (256, 128)
BATCH_SIZE = 256
CROP_SCALE, CROP_RATIO = (0.8, 1.0), (0.375, 0.667)
MEAN = STD = (0.5, 0.5, 0.5)
SPEC = RegionSpec(IMG_SIZE, 16, MEAN, STD, 64, CROP_SCALE, CROP_RATIO, 0.5, "block", 0.75, 4)
BASELINE = "StreamingDataset, PIL, DataLoader: cropped"
BASELINE_CANVAS = "StreamingDataset, PIL, DataLoader: canvas"


@dataclass
class DataBench:
    """What to measure. ``num_images`` are read per measurement, ``rounds`` times, the ways taken in turn."""

    shards: str
    remote: str | None = None  # the same shards in an object store
    num_images: int = 10_000
    rounds: int = 3
    num_threads: int = field(default_factory=dist.usable_cores)
    rate: float = 6000.0  # images/s of a consumer: about what one GPU takes of ViT-B


@dataclass
class Measured:
    """Medians over the rounds."""

    images_per_second: float
    bytes_per_second: float
    cores: int
    waited: float | None = None  # share of the time of a consumer with the asked rate


def run_data(bench: DataBench, out: Path | None = None) -> dict[str, Any]:
    """Measure, print a table, and write the record to ``out``.

    Raises:
        UserError: the shards cannot be read, or hold too few samples.
    """
    if not Path(bench.shards).is_dir():
        raise UserError(f"a directory of shards is required. {bench.shards} is none: name those of a store with --remote")
    with tempfile.TemporaryDirectory(prefix="personmae-bench-") as scratch, ShardSet(bench.shards, scratch) as shards:
        if bench.remote:
            with ShardSet(bench.remote, scratch) as same:  # so that a mistake is an error now and not after minutes
                if same.digest != shards.digest:
                    raise UserError(f"--remote must hold the same shards as {bench.shards}. {bench.remote} has another index")
        least = 8 * BATCH_SIZE
        for name, count in ((f"samples in {bench.shards}", len(shards)), ("--images", bench.num_images)):
            if count < least:
                raise UserError(f"at least {least} {name} are required, got {count}")
        mean_bytes = sum(shard.num_bytes for shard in shards.shards) / len(shards)
        found = {name: Measured(rate, rate * mean_bytes, cores) for name, (rate, cores) in _rates(bench, scratch).items()}
        found["whole pipeline"].waited = _pass(bench, bench.shards, Path(scratch), rate=bench.rate)[1]
        if bench.remote:
            found |= _from_store(bench, bench.remote, Path(scratch), mean_bytes)
        record = {
            "commit": environment.git_commit(),
            "hardware": environment.describe_hardware(),
            "versions": portable.versions(),
            "data": {"samples": len(shards), "mean_bytes": mean_bytes, **_heights(shards)},
            "settings": asdict(bench) | {"shards": Path(bench.shards).name, "remote": bool(bench.remote)},
            "measured": {name: asdict(values) for name, values in found.items()},
            "ratio": found["whole pipeline"].images_per_second / found[BASELINE].images_per_second,
        }
    _print(found, record)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.replace(out, files.to_json(record, indent=1) + "\n")
    return record


def _rates(bench: DataBench, scratch: str) -> dict[str, tuple[float, int]]:
    """Images per second of each way, and the cores it had."""
    baseline_copy = Path(scratch) / "baseline"  # StreamingDataset may write beside what it reads
    baseline_copy.mkdir()
    for path in Path(bench.shards).resolve().iterdir():
        (baseline_copy / path.name).symlink_to(path)
    ways: dict[str, tuple[Callable[[], float], int]] = {
        "raw read": (lambda: _on_one_core(lambda: _raw(bench)), 1),
        "decoder alone": (lambda: _on_one_core(lambda: _decoder(bench)), 1),
        "read, decode, canvas": (lambda: _on_one_core(lambda: _pipeline(bench, num_threads=1)), 1),
        "whole pipeline": (lambda: _pipeline(bench, num_threads=bench.num_threads), bench.num_threads),
        BASELINE: (lambda: _in_own_process(baseline_copy, bench, True), bench.num_threads),
        BASELINE_CANVAS: (lambda: _in_own_process(baseline_copy, bench, False), bench.num_threads),
        "whole pipeline, crop on the CPU": (lambda: _with_crops(bench), bench.num_threads),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1, bench.rounds + 1):
        for name, (measure, _) in ways.items():
            progress.log_to_stderr(f"bench data: round {number} of {bench.rounds}, {name} ...")
            rates[name].append(measure())
    return {name: (statistics.median(found), ways[name][1]) for name, found in rates.items()}


def _on_one_core(measure: Callable[[], float]) -> float:
    """Threads that are started meanwhile share this one's core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        return measure()
    finally:
        os.sched_setaffinity(0, cores)


def _raw(bench: DataBench) -> float:
    """JPEG bytes in the global order, copied out."""
    with ShardSet(bench.shards, "") as shards, closing(_jpegs(shards)) as reader:
        batches = (sum(len(bytes(jpeg)) for jpeg in jpegs) for _, jpegs in reader)
        next(batches)
        return _rate(batches, 4 * bench.num_images)


def _jpegs(shards: ShardSet) -> JpegReader:
    size = BATCH_SIZE
    return JpegReader(shards, seed=0, global_batch_size=size, rank=0, world_size=1, micro_batch_size=size, first_step=0)


def _decoder(bench: DataBench) -> float:
    """libjpeg-turbo alone, full size, into one buffer: its highest rate."""
    buffer = np.empty(1 << 24, np.uint8)
    with ShardSet(bench.shards, "") as shards, closing(_jpegs(shards)) as reader:
        copies = [bytes(jpeg) for _, jpegs in islice(reader, -(-bench.num_images // BATCH_SIZE)) for jpeg in jpegs]
    start = time.perf_counter()
    for jpeg in copies:
        simplejpeg.decode_jpeg(jpeg, "RGB", buffer=buffer)
    return len(copies) / (time.perf_counter() - start)


def _pipeline(bench: DataBench, *, num_threads: int) -> float:
    """Batches as training gets them."""
    with ShardSet(bench.shards, "") as shards, closing(_reader(shards, num_threads)) as reader:
        next(reader)
        return _rate(reader, bench.num_images)


def _with_crops(bench: DataBench) -> float:
    """The regions too, which are otherwise cut on the GPU."""
    with ShardSet(bench.shards, "") as shards, closing(_reader(shards, bench.num_threads)) as reader:
        batches = (prepare_batch(*batch, SPEC) for batch in reader)
        next(batches)
        return _rate(batches, bench.num_images // 8)


def _reader(shards: ShardSet, num_threads: int) -> BatchReader:
    return BatchReader(
        shards,
        canvas_size=SPEC.canvas_size,
        seed=0,
        global_batch_size=BATCH_SIZE,
        rank=0,
        world_size=1,
        micro_batch_size=BATCH_SIZE,
        first_step=0,
        num_threads=num_threads,
        prefetch_batches=4,
        block_size=1 << 18,
        max_bad_ratio=0.01,
    )


def _rate(batches: Iterator[Any], num_images: int) -> float:
    num_batches = -(-num_images // BATCH_SIZE)
    start = time.perf_counter()
    for _ in islice(batches, num_batches):
        pass
    return num_batches * BATCH_SIZE / (time.perf_counter() - start)


def _pass(bench: DataBench, root: str, cache: Path, *, rate: float | None = None) -> tuple[float, float]:
    """Images per second of one pass over the data set, and the share of its time that the consumer waited.

    A consumer with a ``rate`` leaves the cores alone while it works, as one on a GPU does. Without a rate it only waits.
    """
    start = time.perf_counter()
    with ShardSet(root, cache) as shards, closing(_reader(shards, bench.num_threads)) as reader:
        for _ in islice(reader, reader.steps_per_epoch):
            if rate:
                time.sleep(BATCH_SIZE / rate)
        seconds = time.perf_counter() - start
        waited = shards.counters.totals().get("personmae_stream_wait_seconds_total", 0.0)
        return reader.steps_per_epoch * BATCH_SIZE / seconds, waited / seconds


def _from_store(bench: DataBench, root: str, scratch: Path, mean_bytes: float) -> dict[str, Measured]:
    """Passes over the data set with an empty cache and with a full one, from opening it to the last batch."""
    found, cores = {}, bench.num_threads
    for name, cache in (("cold from the store", "cold"), ("warm from the cache", "cold")):
        rate, _ = _pass(bench, root, scratch / cache)
        found[name] = Measured(rate, rate * mean_bytes, cores)
    for name, cache in (("cold from the store", "rated"), ("warm from the cache", "rated")):
        found[name].waited = _pass(bench, root, scratch / cache, rate=bench.rate)[1]
    return found


def _in_own_process(root: Path, bench: DataBench, crop: bool) -> float:
    """Measure the baseline in a new process, since it has shared memory and locks of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), signals.end_quietly) as pool:
        return pool.submit(baseline, str(root), bench.num_images, bench.num_threads, crop).result()


def baseline(root: str, num_images: int, num_workers: int, crop: bool) -> float:
    """Images per second of StreamingDataset, PIL and a DataLoader, to RegionA as the network takes it or to canvases."""
    import io
    import warnings

    from PIL import Image
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader
    from torchvision import transforms

    warnings.simplefilter("ignore")
    steps: list[Any] = [transforms.RandomResizedCrop(IMG_SIZE, CROP_SCALE, CROP_RATIO, transforms.InterpolationMode.BICUBIC)]
    steps += [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    transform = transforms.Compose(steps)

    def on_canvas(image: Image.Image) -> torch.Tensor:
        height, width = SPEC.canvas_size
        image.thumbnail((width, height))
        canvas = torch.zeros(height, width, 3, dtype=torch.uint8)
        canvas[: image.height, : image.width] = torch.from_numpy(np.array(image))
        return canvas

    class Crops(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            image = Image.open(io.BytesIO(super().__getitem__(at)["jpeg"])).convert("RGB")
            return transform(image) if crop else on_canvas(image)

    dataset = Crops(local=root, shuffle=True, batch_size=BATCH_SIZE, num_canonical_nodes=1)
    loader = DataLoader(
        dataset, BATCH_SIZE, num_workers=num_workers, drop_last=True, multiprocessing_context="fork", persistent_workers=True
    )
    epochs = (batch for _ in range(1_000_000) for batch in loader)
    next(epochs)
    return _rate(epochs, num_images)


def _heights(shards: ShardSet) -> dict[str, float]:
    """The middle nine tenths of the first shard's image heights, in pixels."""
    first = shards.open(0)
    heights = [int(simplejpeg.decode_jpeg_header(first.jpeg(at))[0]) for at in range(shards.sizes[0])]
    return {"height_5_percent": float(np.percentile(heights, 5)), "height_95_percent": float(np.percentile(heights, 95))}


def _print(found: dict[str, Measured], record: dict[str, Any]) -> None:
    data, settings = record["data"], record["settings"]
    title = f"{data['samples']:,} images of {data['mean_bytes'] / 1000:.1f} kB, {settings['num_threads']} cores"
    table = Table("way", "images/s", "a core", "MB/s", f"waited at {settings['rate']:,.0f}/s", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in found.items():
        per_core = f"{values.images_per_second / values.cores:,.0f}"
        waited = "" if values.waited is None else f"{values.waited:.1%}"
        table.add_row(name, f"{values.images_per_second:,.0f}", per_core, f"{values.bytes_per_second / 1e6:,.0f}", waited)
    console = Console()
    console.print(table)
    console.print(f"the whole pipeline is {record['ratio']:.1f} times the baseline with the crop, which it leaves to the GPU")
