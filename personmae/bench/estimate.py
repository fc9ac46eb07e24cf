"""Estimates for this machine from a few real steps: images per second of each size, and the time of the quickstart.

``personmae doctor`` runs this in a process of its own and prints the lines. Two sizes take some steps on noise. The others
follow by counted operations. Reading and compiling are not included.
"""

import functools
import json
import os
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from personmae import config, dist
from personmae import flops as operations
from personmae.bench.counts import MODELS, Work, spec_at
from personmae.bench.loop import SYNTHETIC, Cell, Loop
from personmae.model.inputs import RegionSpec
from personmae.model.vit import SIZES
from personmae.precision import AUTO, Native, Precision, choose
from personmae.reid.sampler import pk_batches
from personmae.synthetic.benchmarks import write_synthetic
from personmae.synthetic.plan import SynthSettings, plan

_MEASURED = ("micro", "small")  # the others take too long for a look
_BATCHES = {"cpu": {"micro": 64, "small": 4}, "cuda": {"micro": 512, "small": 128}}  # images
_WARM_UP, _STEPS = 1, {"micro": 2, "small": 1}
_SIDE = {"cpu": 512, "cuda": 4096}  # of the matrices whose products are compared
_CALLS = 5
_FEW = SynthSettings(
    pool_images=64, pool_identities=8, market_train_ids=2, market_test_ids=2, market_distractors=0, market_junk=0,
    occluded_duke_train_ids=2, occluded_duke_test_ids=2,
)  # fmt: skip
_NUM_PROGRAMS = 8  # that the quickstart starts one after the other, its launcher among them
_START = Path("configs/quickstart.yaml")
_TUNED = (Path("configs/quickstart_random.yaml"), Path("configs/quickstart_personmae.yaml"))


class Line(NamedTuple):
    """One conclusion: what it is about, whether the machine is slow at it, and the words."""

    what: str
    is_slow: bool
    text: str


@dataclass(frozen=True, slots=True)
class Speeds:
    """What was measured: operations a second of each size's step, images drawn a second, and seconds that a start takes."""

    steps: dict[str, float]  # by size, the largest last, which stands for those that are missing
    drawing: float
    start: float

    def seconds(self, size: str, flops: float) -> float:
        """The time of this number of operations in training a size."""
        return flops / self.steps.get(size, next(reversed(self.steps.values())))


def main(path: str | None = None, *, quickstart_alone: bool = False) -> None:
    """Measure this machine and print the lines as JSON, with those of the configuration at ``path``."""
    start = time.process_time()  # of this process, which has imported what a program imports
    world = dist.read_world()
    chosen = choose(AUTO, str(world.device))
    dist.start(world)
    try:
        sizes = _MEASURED[:1] if quickstart_alone else _MEASURED
        steps = {size: step_flops(size, chosen.name, world.device.type) for size in sizes}
        speeds = Speeds(steps, drawing_rate(), start)
        lines = [] if quickstart_alone else [precision_line(chosen.native, product_rates(world.device)), *size_lines(speeds)]
        if path:
            lines += config_lines(path, speeds, str(world.device))
        lines += quickstart_lines(speeds, chosen)
    finally:
        dist.stop()
    print(json.dumps([line._asdict() for line in lines]))


def product_rates(device: torch.device) -> dict[str, float]:
    """Operations a second of a square product in both precisions. It is short even where one of them is emulated."""
    side, rates = _SIDE[device.type], {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left = torch.randn(side, side, device=device).to(dtype)
        (left @ left).float().sum().item()  # waits for a GPU
        start = time.perf_counter()
        for _ in range(_CALLS - 1):
            torch.mm(left, left)
        (left @ left).float().sum().item()
        rates[name] = _CALLS * 2.0 * side**3 / (time.perf_counter() - start)
    return rates


def step_flops(size: str, precision: str, device: str) -> float:
    """Operations a second of a whole pre-training step of a size, at the image size that it trains on."""
    batch = _BATCHES[device][size]
    cell = Cell(size, batch, "native", "off", precision, "none", MODELS[size])
    with closing(Loop(cell, None)) as loop, loop.batches(SYNTHETIC) as batches:
        loop.run(batches, _WARM_UP)
        milliseconds = min(sum(parts) for parts in loop.run(batches, _STEPS[size]))
    return 1000 * batch * Work(size, cell.spec, precision).flops / milliseconds


def drawing_rate() -> float:
    """Synthetic people that this machine draws a second on all its cores."""
    with tempfile.TemporaryDirectory(prefix="personmae-doctor-") as folder:
        start = time.perf_counter()
        counts = write_synthetic(Path(folder) / "few", _FEW, num_processes=1)
        return sum(counts.values()) * dist.usable_cores() / (time.perf_counter() - start)


def precision_line(native: Native, rates: dict[str, float]) -> Line:
    """What ``auto`` takes here and whether the measured products agree. The other precision is called slow where it is."""
    best, other = native.best, "fp32" if native.bf16 else "bf16"
    text = f"{best}, by auto: {native.why}. Products: {_billions(rates[best])} in {best}, {_billions(rates[other])} in {other}"
    if rates[best] >= rates[other]:
        slow = f". Slow here: train.precision=bf16, at {_share(rates['bf16'] / rates['fp32'])} of fp32's rate"
        return Line("precision", False, text + (slow if best == "fp32" else ""))
    return Line("precision", True, f"{text}. Slow: auto's choice was slower when measured. Give train.precision={other}")


def size_lines(speeds: Speeds) -> list[Line]:
    """Images a second of each size that people train here: all but large."""
    lines = []
    for size, img_size in MODELS.items():
        if size != "large":
            rate = 1 / speeds.seconds(size, Work(size, spec_at(img_size)).flops)
            how = "" if size in speeds.steps else ", counted from small's"
            lines.append(Line(f"{size} at {img_size[0]}x{img_size[1]}", False, f"about {_two_digits(rate)} images/s{how}"))
    return lines


def config_lines(path: str, speeds: Speeds, device: str) -> list[Line]:
    """What a configuration's precision means here, and for pre-training its speed and time.

    Raises:
        UserError: the file is not for a program.
    """
    settings = config.load(config.PROGRAMS[config.program_of(path)], path)
    assert isinstance(settings, config.Pretrain | config.Finetune | config.Unsupervised)
    chosen = choose(settings.train.precision, device)
    lines = [Line(f"{path}: precision", chosen.is_slow, str(chosen).removeprefix("precision "))]
    if isinstance(settings, config.Pretrain):
        seconds = speeds.seconds(settings.model.size, pretrain_flops(settings))
        text = f"about {_two_digits(1 / seconds)} images/s"
        if settings.train.total_steps:
            text += f", {_long(seconds * settings.train.total_steps * settings.train.global_batch_size)} in all"
        lines.append(Line(f"{path}: speed", False, f"not estimated in {chosen.name}" if chosen.is_slow else text))
    return lines


def quickstart_lines(speeds: Speeds, chosen: Precision) -> list[Line]:
    """How long ``make quickstart`` takes, where its configurations are, i.e. in a checkout."""
    if not all(path.is_file() for path in (_START, *_TUNED)):
        return []
    settings = config.load(config.Pretrain, _START)
    images = (settings.train.total_steps or 0) * settings.train.global_batch_size
    seconds = images * speeds.seconds(settings.model.size, pretrain_flops(settings))
    synthetic = SynthSettings()
    for path in _TUNED:
        tuned = config.load(config.Finetune, path)
        count = tuned.train.epochs * images_per_epoch(tuned, synthetic)
        seconds += count * speeds.seconds(tuned.model.size, finetune_flops(tuned))
    seconds += num_drawn(synthetic) / speeds.drawing + _NUM_PROGRAMS * speeds.start
    where = f"{dist.usable_cores()} cores" if dist.read_world().device.type == "cpu" else "a GPU"
    where += f", busy with other work: load {os.getloadavg()[0]:.0f}" * (os.getloadavg()[0] > 1.5 * dist.usable_cores())
    return [Line("make quickstart", False, f"{_long(seconds)} on this machine ({where}, {chosen})")]


@functools.cache
def num_drawn(synthetic: SynthSettings) -> int:
    """Images of synthetic people in all."""
    return len(plan(synthetic))


def pretrain_flops(settings: config.Pretrain) -> float:
    """Operations of an image in a pre-training step of the configuration, with decoders of the default width."""
    return Work(settings.model.size, RegionSpec(**settings.region_arguments()), decoder_depth=settings.decoders.depth).flops


def finetune_flops(settings: config.Finetune) -> float:
    """Operations of an image in a fine-tuning step: the encoder, forward and backward. MGN runs the last block three times."""
    model, encoder = settings.model, SIZES[settings.model.size]
    num_patches = model.img_size[0] * model.img_size[1] // model.patch_size**2
    depth = encoder["depth"] + (2 if settings.head.kind == "mgn" else 0)
    embed = 2.0 * num_patches * 3 * model.patch_size**2 * encoder["embed_dim"]
    return 3 * (embed + operations.transformer_flops(1 + num_patches, encoder["embed_dim"], depth))


def images_per_epoch(settings: config.Finetune, synthetic: SynthSettings) -> int:
    """Images of the first epoch on the synthetic benchmark in Market-1501's layout."""
    batch = settings.batch
    pids = np.repeat(np.arange(synthetic.market_train_ids), synthetic.images_per_id)
    return pk_batches(pids, num_ids=batch.num_ids, num_instances=batch.num_instances, seed=settings.seed, epoch=0).size


def _billions(rate: float) -> str:
    return f"{_two_digits(rate / 1e9)} GFLOP/s"


def _share(ratio: float) -> str:
    """A ratio below one, never as 0.0."""
    return f"1/{round(1 / ratio)}" if ratio <= 0.25 else f"{ratio:.0%}"


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.12g}"


def _long(seconds: float) -> str:
    """A time in words, as exact as an estimate is."""
    if seconds < 5400:
        minutes = max(1, round(seconds / 60))
        return f"about {minutes} minute{'s' * (minutes > 1)}"
    hours = seconds / 3600
    return f"about {_two_digits(hours)} hours" if hours < 48 else f"about {_two_digits(hours / 24)} days"
