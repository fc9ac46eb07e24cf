"""``personmae bench step``: the speed of a step, the time of its parts, and the share of this machine that it uses.

Every cell of the grid (size x batch x engine x precision x checkpointing x compilation) has a process of its own. On a CPU
the cells with equal work take turns, so that their ratios hold while other programs come and go. On a GPU they would share
its memory, so one runs after the other.
"""

import contextlib
import itertools
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from rich.console import Console
from rich.table import Table

from personmae import dist
from personmae import flops as operations
from personmae.bench.ceilings import Ceilings, measure_alone, require_native
from personmae.bench.counts import Work
from personmae.bench.loop import (
    ENGINES,
    PARTS,
    PLAIN,
    SHARDS,
    SYNTHETIC,
    Cell,
    Compiled,
    Failed,
    Repeat,
    close_loop,
    open_loop,
    run_round,
)
from personmae.checkpoint import portable
from personmae.data.shard_set import ShardSet
from personmae.errors import UserError
from personmae.model.compiled import CropBackend, require_kernel
from personmae.model.vit import SIZES, ActivationCheckpointing
from personmae.monitor import environment, progress
from personmae.precision import AUTO, NAMES
from personmae.system import files, signals

T = TypeVar("T")
_KEYS = ("size", "batch_size", "engine", "precision", "compile", "checkpointing", "crop_backend", "source")


@dataclass(frozen=True, slots=True)
class StepBench:
    """The grid, and how long each cell is looked at: ``rounds`` of ``num_steps``, with ``shards`` as many on real images."""

    sizes: tuple[str, ...] = ("micro",)
    batches: tuple[int, ...] = (32,)
    engines: tuple[str, ...] = ("native",)
    compile: tuple[str, ...] = ("off",)
    precisions: tuple[str, ...] = (AUTO,)
    checkpointing: tuple[str, ...] = ("none",)
    crop_backends: tuple[str, ...] = ("torch",)
    img_size: tuple[int, int] = (256, 128)
    shards: str | None = None
    num_steps: int = 20
    rounds: int = 3

    def groups(self) -> list[list[Cell]]:
        """Cells, those at equal work together.

        Raises:
            UserError: a name is not known, or the images do not consist of patches.
        """
        for what, given, known in (
            ("sizes", self.sizes, tuple(SIZES)),
            ("engines", self.engines, ENGINES),
            ("compile", self.compile, get_args(Compiled)),
            ("precision", self.precisions, (AUTO, *NAMES)),
            ("checkpointing", self.checkpointing, get_args(ActivationCheckpointing)),
            ("crop-backends", self.crop_backends, get_args(CropBackend)),
        ):
            if wrong := [name for name in given if name not in known]:
                raise UserError(f"--{what} takes {', '.join(known)}. Got {wrong[0]!r}")
        if any(side % 16 for side in self.img_size):
            raise UserError(f"--img-size must be multiples of 16, got {self.img_size[0]}x{self.img_size[1]}")
        return [
            [
                Cell(size, batch, engine, how, precision, checkpointing, self.img_size, cropped_by)  # type: ignore[arg-type]
                for engine, precision, checkpointing, how, cropped_by in itertools.product(
                    self.engines, self.precisions, self.checkpointing, self.compile, self.crop_backends
                )
            ]
            for size, batch in itertools.product(self.sizes, self.batches)
        ]


def run_step(bench: StepBench, out: Path | None = None, *, ceilings: Ceilings | None = None) -> dict[str, Any]:
    """Measure, print tables, and write the record to ``out``, what there is of it after each cell.

    ``ceilings`` are measured too unless they are given. A precision that the device has not is left out, with a line.

    Raises:
        UserError: the grid is not possible here, or the shards cannot be read or hold too little.
    """
    bench.groups()  # so that wrong names are an error first
    device = dist.read_world().device
    bench = replace(bench, precisions=require_native(bench.precisions, device))
    groups = bench.groups()
    if "graph" in bench.compile and device.type == "cpu":
        raise UserError("--compile graph needs a GPU and there is none. Leave it out")
    if "triton" in bench.crop_backends:
        require_kernel(device)
    if bench.shards:
        _require_samples(bench.shards, max(bench.batches))
    teams = groups if device.type == "cpu" else [[cell] for group in groups for cell in group]
    if not ceilings:
        progress.log_to_stderr("bench step: measuring the most that this machine can do ...")
    ceilings = ceilings or measure_alone(bench.precisions)
    print(f"bench step: this machine does {_described(ceilings)}", flush=True)
    shards = Path(bench.shards).name if bench.shards else None
    record: dict[str, Any] = {
        "commit": environment.git_commit(),
        "hardware": environment.describe_hardware(),
        "versions": portable.versions(),
        "settings": asdict(bench) | {"shards": shards, "device": str(device), "threads": dist.usable_cores()},
        "ceilings": asdict(ceilings),
        "measured": [],
    }
    for number, team in enumerate(teams, 1):
        record["measured"] += _measure(bench, team, ceilings, record["hardware"]["gpus"], f"{number}/{len(teams)}")
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            files.replace(out, files.to_json(record, indent=1) + "\n")
    _print(record)
    return record


def _require_samples(shards: str, batch_size: int) -> None:
    """Check the shards now, before minutes of measuring."""
    with tempfile.TemporaryDirectory(prefix="personmae-bench-") as scratch, ShardSet(shards, scratch) as opened:
        if len(opened) < batch_size:
            raise UserError(f"at least {batch_size} samples in {shards} are required, got {len(opened)}")


class _Alone:
    """A process of its own. After a failure it gets no more work."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), signals.end_quietly)
        self.failed = ""

    def __enter__(self) -> "_Alone":
        return self

    def __exit__(self, *_: object) -> None:
        self.ask(close_loop)
        self._pool.shutdown()

    def ask(self, work: Callable[..., T | Failed], *args: object) -> T | None:
        """What ``work`` returns there, or None after a failure."""
        if self.failed:
            return None
        try:
            answer = self._pool.submit(work, *args).result()
        except BrokenProcessPool:
            answer = Failed("its process was ended from outside, as it is where memory runs out")
        if isinstance(answer, Failed):
            self.failed = answer.why
            return None
        return answer


def _measure(bench: StepBench, team: list[Cell], ceilings: Ceilings, gpus: list[str], place: str) -> list[dict[str, Any]]:
    """Rows of the record, one for each cell and source, from cells that are taken in turn."""
    sources = (SYNTHETIC, SHARDS) if bench.shards else (SYNTHETIC,)
    rounds: dict[tuple[Cell, str], list[Repeat]] = {(cell, source): [] for cell in team for source in sources}
    firsts: dict[Cell, float | None] = {}
    with contextlib.ExitStack() as stack:
        alone = {cell: stack.enter_context(_Alone()) for cell in team}
        for cell, process in alone.items():
            firsts[cell] = process.ask(open_loop, cell, bench.shards)
            done = f"first step after {firsts[cell]:.1f} s" if firsts[cell] else process.failed
            print(f"bench step {place}: {_name(asdict(cell))}: {done}", flush=True)
        for _ in range(bench.rounds):
            for (cell, source), found in rounds.items():
                if one := alone[cell].ask(run_round, source, bench.num_steps):
                    found.append(one)
    rows = []
    for (cell, source), found in rounds.items():
        row = {**asdict(cell), "source": source, "failed": None if found else alone[cell].failed}
        if found:
            row |= _summary(cell, found, ceilings, gpus) | {"first_step_seconds": firsts[cell]}
            speed = f"{row['milliseconds']:.1f} ms, {row['images_per_second']:,.0f} images/s, MFU {row['mfu']:.1%}"
            print(f"bench step {place}: {_name(row)}: {speed}", flush=True)
        rows.append(row)
    return rows


def _summary(cell: Cell, rounds: list[Repeat], ceilings: Ceilings, gpus: list[str]) -> dict[str, Any]:
    """Medians over the rounds. A step and its parts are medians of a round too. Images a second are those of all its time, so
    that a wait which comes now and then counts. Rounds after the first find the memory of others, so its peak is the one."""
    steps = [[sum(parts) for parts in one.milliseconds] for one in rounds]
    parts = [[statistics.median(times) for times in zip(*one.milliseconds, strict=True)] for one in rounds]
    rate = statistics.median(1000 * cell.batch_size * len(times) / sum(times) for times in steps)
    flops = Work(cell.size, cell.spec, cell.precision).flops
    sheet = operations.peak_flops(gpus[0], cell.precision) if gpus else None
    return {
        "rounds": len(rounds),
        "milliseconds": statistics.median(map(statistics.median, steps)),
        "parts_milliseconds": dict(zip(PARTS, map(statistics.median, zip(*parts, strict=True)), strict=True)),
        "images_per_second": rate,
        "flops_per_image": flops,
        "flops_per_second": rate * flops,
        "mfu": rate * flops / ceilings.matrix_rate[cell.precision],
        "mfu_of_data_sheet": rate * flops / sheet if sheet else None,
        "peak_bytes": rounds[0].peak_bytes,
        "reserved_bytes": rounds[0].reserved_bytes,
    }


def _described(ceilings: Ceilings) -> str:
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {precision}" for precision, rate in ceilings.matrix_rate.items())
    return f"{rates}, and moves {ceilings.bandwidth / 1e9:,.0f} GB/s"


def _name(row: dict[str, Any], keys: tuple[str, ...] = _KEYS) -> str:
    """The name of a row, in the order of ``_KEYS``. Settings without information are left out."""
    texts = {
        "batch_size": f"{row['batch_size']} images",
        "compile": {"off": "eager", "on": "compiled", "graph": "CUDA graphs"}[row["compile"]],
        "checkpointing": "" if row["checkpointing"] == "none" else f"{row['checkpointing']} checkpointing",
        "crop_backend": "" if row["crop_backend"] == "torch" else "regions by the kernel",
    }
    return ", ".join(text for key in keys if (text := texts.get(key, row.get(key, ""))))


def _print(record: dict[str, Any]) -> None:
    """Two tables: speed and memory of each cell, and the parts of its step. What all cells have in common is their title."""
    rows = [row for row in record["measured"] if not row["failed"]]
    varying = tuple(key for key in _KEYS if len({row[key] for row in record["measured"]}) > 1)
    console = Console()
    console = console if console.is_terminal else Console(width=max(console.width, 140))
    if rows:
        height, width = rows[0]["img_size"]
        settings = record["settings"]
        where = f"{settings['threads']} threads" if settings["device"] == "cpu" else record["hardware"]["gpus"][0]
        title = f"{_name(rows[0], tuple(key for key in _KEYS if key not in varying))}, {height}x{width}, {where}"
        console.print(_speeds(rows, varying, title))
        parts = Table("ms of", *PARTS, title=title)
        for row in rows:
            parts.add_row(_name(row, varying), *(f"{row['parts_milliseconds'][part]:.1f}" for part in PARTS))
        _align(parts)
        console.print(parts)
    for row in record["measured"]:
        if row["failed"]:
            console.print(f"not measured: {_name(row)}: {row['failed']}", markup=False)


def _speeds(rows: list[dict[str, Any]], varying: tuple[str, ...], title: str) -> Table:
    plain = {_work(row): row["milliseconds"] for row in rows if row["engine"] == PLAIN}
    columns: dict[str, list[str]] = {"": [_name(row, varying) for row in rows]}
    for name, text_of in (
        ("ms a step", lambda row: f"{row['milliseconds']:.1f}"),
        ("images/s", lambda row: f"{row['images_per_second']:,.0f}"),
        ("TFLOP/s", lambda row: f"{row['flops_per_second'] / 1e12:.3g}"),
        ("MFU", lambda row: f"{row['mfu']:.1%}"),
        ("of data sheet", lambda row: f"{row['mfu_of_data_sheet']:.1%}" if row["mfu_of_data_sheet"] else ""),
        ("peak GB", lambda row: f"{row['peak_bytes'] / 1e9:.2f}"),
        ("first step s", lambda row: f"{row['first_step_seconds']:.1f}"),
        ("over the plain loop", lambda row: _over(row, plain.get(_work(row)))),
    ):
        columns[name] = [text_of(row) for row in rows]
    columns = {name: texts for name, texts in columns.items() if any(texts)}
    table = Table(*columns, title=title)
    for texts in zip(*columns.values(), strict=True):
        table.add_row(*texts)
    _align(table)
    return table


def _over(row: dict[str, Any], plain: float | None) -> str:
    if plain is None or row["engine"] == PLAIN:
        return ""
    return f"{row['milliseconds'] - plain:+.1f} ms, {row['milliseconds'] / plain:.2f} x"


def _work(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows share that differ in their engine only."""
    return tuple(row[key] for key in _KEYS if key != "engine")


def _align(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"
