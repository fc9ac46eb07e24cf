"""Our pre-training beside the usual way of doing the same work: one device, one process, the ways in turn.

    python benchmarks/peers/compare.py --shards runs/quickstart/shards        # the quickstart, two minutes on 2 idle CPU cores
    python benchmarks/peers/compare.py --shards DIR --size base --img-size 256 128 --batch-size 256 --compile   # on a GPU

Each way trains on from the same weights. ``step`` is one batch that lies ready on the device, the regions cut; ``cut and
step`` is ours from canvases, beside the usual step whose regions its workers would have cut; ``whole`` is from JPEGs, ours in
their shards and the usual way's in a folder. All run with the settings of this process: threads, and the allocator that
``dist.start`` arranges, which both gain from. Prints a table and writes milliseconds of every round, and ratios with the lowest
and the highest round; what there is of them after each part.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import usual
from rich.console import Console
from rich.table import Table
from torch import Tensor

from personmae import batch_plan, config, dist, precision, pretrain, pretrain_log
from personmae.bench.ceilings import require_native
from personmae.checkpoint import portable
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader, CanvasBatch
from personmae.errors import UserError
from personmae.guard import Guard
from personmae.model.inputs import RegionSpec
from personmae.model.teacher import Teacher
from personmae.monitor import environment
from personmae.precision import AUTO, NAMES
from personmae.pretrain_state import PretrainState

RESULTS = Path(__file__).resolve().parents[1] / "results" / "peers.json"
MOST_FILES = 50_000  # of a large data set, the usual way is given so many images
MEMORY_WARM_UP = 3  # steps until memory is taken and code is compiled
TOTAL_STEPS = 100_000  # of the schedules; what a step takes does not depend on it
Times = dict[str, dict[str, list[float]]]  # milliseconds of a step in each round: by way, then by part


@dataclass
class Way:
    """One step, to be called again and again; the first ``warm_up`` are not timed."""

    step: Callable[[], object]
    warm_up: int = MEMORY_WARM_UP


class Ours:
    """The body of ``pretrain.train``."""

    def __init__(self, settings: config.Pretrain, world: dist.World, shards: ShardSet):
        torch.manual_seed(settings.seed)
        chosen = precision.choose(settings.train.precision, str(world.device))
        model, spec = pretrain.build_model(settings, chosen).to(world.device), RegionSpec(**settings.region_arguments())
        teacher = self.teacher = Teacher(model.encoder, spec.grid, model.compute_dtype).to(world.device)
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train = settings.train
        self.prepare = pretrain.choose_prepare(model, **settings.prepare_arguments())
        if train.compile:
            pretrain.compile_parts(model, teacher, train.cuda_graphs)
        plan = batch_plan.plan_batch(settings.train.global_batch_size, 1, settings.train.global_batch_size)
        self.engine = pretrain.build_engine(settings, model, plan)
        self.state = PretrainState(settings, world, plan, spec, shards, self.engine, teacher, TOTAL_STEPS, chosen)
        self.guard = Guard(world.device, max_skipped_steps=train.max_skipped_steps)
        self.copies = torch.cuda.Stream() if world.device.type == "cuda" else None

    def next_batch(self, reader: BatchReader) -> CanvasBatch:
        return pretrain.to_device(next(reader), self.state.world.device, self.copies)

    def cut(self, batch: CanvasBatch) -> dict[str, Tensor]:
        if self.state.settings.train.cuda_graphs:  # else it would only import much of the compiler
            torch.compiler.cudagraph_mark_step_begin()
        return self.prepare(*batch, self.state.spec)

    def step(self, inputs: dict[str, Tensor]) -> None:
        state, settings = self.state, self.state.settings
        inputs = inputs | {"target": self.teacher(inputs["patches_b"])}
        parts = self.engine.forward_backward(inputs, last_micro=True)
        losses = dict(zip(parts, torch.stack(list(parts.values())), strict=True))
        grad_norm, skipped = self.engine.step(pretrain.lr_scale_at(settings, state.step, TOTAL_STEPS))
        with self.engine.full_params(self.engine.module.get_submodule("encoder")) as params:
            self.teacher.update(params, pretrain.momentum_at(settings, state.step, TOTAL_STEPS), skipped)
        self.guard.add(losses["loss"], skipped)
        state.step += 1
        if state.step % settings.train.log_every == 0:
            pretrain_log.mean_over_ranks(losses | {"grad_norm": grad_norm})

    def ways(self, reader: BatchReader) -> dict[str, Way]:
        num_ahead = self.state.settings.data.prefetch_batches + 3
        batch = CanvasBatch(*(tensor.clone() for tensor in self.next_batch(reader)))
        inputs = {name: tensor.clone() for name, tensor in self.cut(batch).items()}
        return {
            "step": Way(lambda: self.step(inputs)),
            "cut and step": Way(lambda: self.step(self.cut(batch))),
            "whole": Way(lambda: self.step(self.cut(self.next_batch(reader))), 2 * num_ahead),
        }


def usual_ways(
    ours: Ours, batches: Iterator[usual.Sample], num_ahead: int, *, dtype: torch.dtype, compile: bool
) -> dict[str, Way]:
    """The usual way from the weights that ours began with."""
    settings, device = ours.state.settings, ours.state.world.device
    model = usual.UsualPersonMAE(settings.model.size, ours.state.spec, decoder_depth=settings.decoders.depth)
    model.load_state_dict(ours.weights)
    arguments: dict[str, Any] = {"betas": settings.optim.betas, "weight_decay": settings.optim.weight_decay}
    trainer = usual.Trainer(model.to(device), dtype=dtype, compile=compile, **arguments)
    done = 0

    def step(batch: usual.Sample) -> None:
        nonlocal done
        lr = pretrain.peak_lr(settings) * pretrain.lr_scale_at(settings, done, TOTAL_STEPS)
        trainer.step(batch, lr, pretrain.momentum_at(settings, done, TOTAL_STEPS))
        done += 1

    ready = usual.Sample(*(tensor.to(device) for tensor in next(batches)))
    return {"step": Way(lambda: step(ready)), "whole": Way(lambda: step(next(batches)), num_ahead)}


def measure(way: Way, num_steps: int, device: torch.device) -> float:
    """Milliseconds of a step, all of them taken together."""
    for _ in range(way.warm_up):
        way.step()
    _wait(device)
    start = time.perf_counter()
    for _ in range(num_steps):
        way.step()
    _wait(device)
    return 1000 * (time.perf_counter() - start) / num_steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_files(shards: ShardSet, folder: Path) -> None:
    """Write images as the usual way has them, a file each."""
    for sample_id in range(min(len(shards), MOST_FILES)):
        (folder / f"{sample_id:07}.jpg").write_bytes(shards.jpeg(sample_id))


def read_settings(arguments: argparse.Namespace) -> config.Pretrain:
    """The defaults, with the quickstart's share of the shift."""
    return config.Pretrain.model_validate(
        {
            "run_dir": "unused",
            "data": {"shards": arguments.shards},
            "model": {"size": arguments.size, "img_size": arguments.img_size},
            "regions": {"max_shift": arguments.img_size[0] // 4},
            "engine": {"name": "native"},
            "train": {
                "global_batch_size": arguments.batch_size,
                "precision": arguments.precision,
                "compile": arguments.compile or arguments.cuda_graphs,
                "cuda_graphs": arguments.cuda_graphs,
            },
        }
    )


def compare(arguments: argparse.Namespace, world: dist.World, folder: Path, tell: Callable[[Times], object]) -> None:
    """Tell the milliseconds of a step, after each part in each round all that there are."""
    settings, num_workers = read_settings(arguments), dist.usable_cores()
    has_bf16 = "bf16" in require_native(["bf16", "fp32"], world.device)
    variants = {"usual, bf16": (torch.bfloat16, False)} if has_bf16 else {}
    if not arguments.no_fp32:
        variants["usual, fp32"] = torch.float32, False
    if arguments.compile_usual and has_bf16:
        variants["usual, bf16, torch.compile"] = torch.bfloat16, True
    num_ahead = 2 * num_workers  # what the workers of a DataLoader have ready
    num_batches = 1 + num_ahead + len(variants) * (1 + arguments.rounds * (num_ahead + arguments.steps))
    with ShardSet(arguments.shards, folder / "cache") as shards:
        if len(shards) < arguments.batch_size:
            raise UserError(f"a batch of {arguments.batch_size} samples is required; {shards.root} holds {len(shards)}")
        (folder / "images").mkdir()
        to_files(shards, folder / "images")
        spec = RegionSpec(**settings.region_arguments())
        pinned = world.device.type == "cuda"
        loader = usual.load(
            folder / "images", spec, arguments.batch_size, num_workers, pin_memory=pinned, num_batches=num_batches
        )
        batches = iter(loader)
        next(batches)  # workers are forked before any thread of ours is started
        ours = Ours(settings, world, shards)
        with closing(pretrain.build_reader(ours.state)) as reader, closing(ours.engine):
            ways = {"ours": ours.ways(reader)}
            for name, (dtype, compiled) in variants.items():
                ways[name] = usual_ways(ours, batches, num_ahead, dtype=dtype, compile=compiled)
            found: Times = {name: {part: [] for part in parts} for name, parts in ways.items()}
            for _ in range(arguments.rounds):
                for part in ("step", "cut and step", "whole"):
                    for name in ways:
                        if part in ways[name]:
                            found[name][part].append(measure(ways[name][part], arguments.steps, world.device))
                    tell(found)


def ratios(found: Times) -> dict[str, dict[str, dict[str, float]]]:
    """By how much ours is faster, by part and usual way: the median of the rounds' ratios, the lowest and the highest.

    A round counts in a part that both have done; a part that no round has come to is left out.
    """
    result: dict[str, dict[str, dict[str, float]]] = {}
    for part, ours in found["ours"].items():
        for name, times in found.items():
            theirs = times.get("step" if part == "cut and step" else part, [])
            per_round = [a / b for a, b in zip(theirs, ours, strict=False)]
            if name != "ours" and per_round:
                spread = {"lowest": min(per_round), "median": statistics.median(per_round), "highest": max(per_round)}
                result.setdefault(part, {})[name] = spread
    return result


def show(record: dict[str, Any]) -> None:
    """Print the table."""
    settings = record["settings"]
    height, width = settings["img_size"]
    title = f"{settings['size']} at {height}x{width}, batches of {settings['batch_size']}, {settings['device']}"
    table = Table("part", "way", "ms a step", "images/s", "times ours", "rounds", title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    for part in ("step", "cut and step", "whole"):
        for name, parts in record["milliseconds"].items():
            if part in parts:
                median = statistics.median(parts[part])
                ratio = record["ratios"][part].get(name)
                times = (f"{ratio['median']:.2f}", f"{ratio['lowest']:.2f} - {ratio['highest']:.2f}") if ratio else ()
                table.add_row(part, name, f"{median:.1f}", f"{1000 * settings['batch_size'] / median:,.0f}", *times)
    console = Console()
    console.print(table)
    least = next(iter(record["ratios"]["cut and step"].values()))["median"]
    console.print(f"with the cut inside its step, ours takes {1 / least:.2f} of the usual one, which is given its regions")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="directory or s3://bucket/prefix of MDS shards")
    parser.add_argument("--size", default="micro")
    parser.add_argument("--img-size", type=int, nargs=2, default=[128, 64], metavar=("H", "W"))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", default=AUTO, choices=[AUTO, *NAMES], help="of ours (default auto)")
    parser.add_argument("--compile", action="store_true", help="torch.compile ours")
    parser.add_argument("--cuda-graphs", action="store_true", help="torch.compile ours, and replay it as CUDA graphs")
    parser.add_argument("--no-fp32", action="store_true", help="leave out the usual way in fp32")
    parser.add_argument("--compile-usual", action="store_true", help="measure the usual way under torch.compile too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=12, help="timed steps of each way in a round; let each worker give several"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    world = dist.read_world()
    (arguments.precision,) = require_native([arguments.precision], world.device)
    dist.start(world)
    settings = vars(arguments) | {"shards": Path(arguments.shards).name, "out": arguments.out.name}
    record: dict[str, Any] = {
        "commit": environment.git_commit(),
        "hardware": environment.describe_hardware(),
        "versions": portable.versions(),
        "settings": settings | {"device": str(world.device), "threads": torch.get_num_threads()},
    }

    def write(found: Times) -> None:
        record.update(milliseconds=found, ratios=ratios(found))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    try:
        with tempfile.TemporaryDirectory(prefix="personmae-peers-") as folder:
            compare(arguments, world, Path(folder), write)
    finally:
        dist.stop()
    show(record)


if __name__ == "__main__":
    main()
