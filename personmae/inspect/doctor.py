"""``personmae doctor``: what this machine has, and which commands would fail on it and why.

Everything that may be broken, torch above all, is tried in a process of its own. So doctor always prints something.
It never prints a secret: of credentials only their origin, and of addresses only the host.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table
from rich.text import Text

from personmae import config
from personmae.errors import Incomplete, UserError
from personmae.inspect import facts
from personmae.inspect.facts import gib, without_secrets
from personmae.monitor.progress import counted

MIN_FREE_BYTES = 1 << 30  # of disk, for a run's checkpoints and logs
COMPILE_TIMEOUT, TIMEOUT = 120, 60  # seconds
ESTIMATE_TIMEOUT = 180
ESTIMATE = "from personmae.bench import estimate; estimate.main({path!r}, quickstart_alone={quickstart_alone})"
QUICKSTART = Path("runs/quickstart")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether something works, and the detail of the attempt."""

    works: bool
    detail: str
    slow: bool = False  # it works, and the detail says how it would be faster


# Each runs in a Python process of its own. The last line that it prints is the detail.
PROBES = {
    "torch": """
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
(torch.randn(64, 64, device=device) @ torch.randn(64, 64, device=device)).sum().item()
cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
level = torch.backends.cpu.get_cpu_capability()
print(f"built for {cuda}; runs on {device} ({level}); a product runs")
""",
    "torchvision": """
import torch, torchvision.ops
torchvision.ops.nms(torch.tensor([[0., 0., 1., 1.]]), torch.tensor([1.]), 0.5)
print("fits this torch: torchvision.ops.nms runs")
""",
    "deepspeed": """
import deepspeed
print("imports")
""",
    "process group": """
import torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
ones = torch.ones(1)
dist.all_reduce(ones)
dist.destroy_process_group()
print("gloo, a group of one: all_reduce runs")
""",
    "torch.compile": """
import time, torch
from personmae.system import compile_cache
compile_cache.mend()
start = time.perf_counter()
torch.compile(lambda x: (x * 2 + 1).relu())(torch.ones(64))
print(f"compiles and runs a small function, {time.perf_counter() - start:.0f} s")
""",
}
IMPORT_ALL = """
import importlib, json
faults = {}
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        faults[name] = f"{type(error).__name__}: {error}"
print(json.dumps(faults))
"""
REMEDIES = {
    "torch": "install torch again",
    "torchvision": "install the torchvision that was built for this torch",
    "deepspeed": "set engine.name=native",
    "process group": "allow gloo its sockets: check the host name and GLOO_SOCKET_IFNAME",
    "torch.compile": "set train.compile=false, or install g++ and Python's headers",
    "compiler": "set train.compile=false, or install g++",
    "disk": f"free {MIN_FREE_BYTES >> 30} GiB here, or set run_dir elsewhere",
    "shards": "see the line on the shards above",
    "steps": "see the line on steps above",
}
# What each verb needs: its module, and probes or parts of the machine.
VERBS = {
    "synth": ("personmae.synthetic.benchmarks", ("disk",)),
    "shards": ("personmae.data.importer", ("torchvision", "disk")),
    "pretrain": (
        "personmae.pretrain",
        ("torch", "torchvision", "process group", "deepspeed", "compiler", "torch.compile", "disk", "shards", "steps"),
    ),
    "finetune": ("personmae.finetune", ("torch", "process group", "disk")),
    "unsupervised": ("personmae.unsupervised", ("torch", "process group", "disk")),
    "evaluate": ("personmae.evaluate", ("torch",)),
    "report": ("personmae.report.report", ("torch",)),
    "bench": ("personmae.bench", ("torch", "torchvision", "disk")),
    "doctor": ("personmae.inspect.doctor", ()),
}


def run(*, shards: str | None = None, config_path: str | None = None) -> None:
    """Print facts about the machine, what works, the speed to expect, and which commands would fail.

    Raises:
        UserError: ``config_path`` is no configuration, or ``shards`` cannot be read. In the second case all else is
            printed first.
        Incomplete: a command would fail here.
    """
    if config_path:
        config.load(config.PROGRAMS[require_program(config_path)], config_path)
    console = Console() if Console().is_terminal else Console(width=140)
    print_facts(console, "machine", facts.machine() | facts.devices())
    print_facts(console, "versions", facts.versions())
    outcomes = probe_all()
    outcomes["compiler"] = find_compiler()
    outcomes["disk"] = check_disk(Path.cwd())
    print_outcomes(console, "what works", {name: outcomes[name] for name in (*PROBES, "compiler", "disk")})
    print_facts(console, "object store", facts.object_store())
    refusal = None
    if shards:
        outcomes["shards"], refusal = try_shards(shards)
        print_outcomes(console, f"shards at {without_secrets(shards)}", {"shards": outcomes["shards"]})
    console.print("measuring a few steps ...")
    expected = expect(config_path)
    outcomes |= {name: outcome for name, outcome in expected.items() if not outcome.works}
    print_outcomes(console, "what to expect: estimates from a few steps, without reading and compiling", expected)
    judged = commands(outcomes)
    print_outcomes(console, "commands: what would fail here", judged)
    if refusal:
        raise refusal
    if failing := [verb for verb, outcome in judged.items() if not outcome.works]:
        raise Incomplete(f"would fail here: {', '.join(failing)}. The table says why and what to do")


def print_quickstart() -> None:
    """Print how long ``make quickstart`` takes on this machine, or that it continues where it has begun."""
    if (QUICKSTART / "pretrain" / "checkpoints").is_dir():
        print(f"make quickstart continues in {QUICKSTART}", flush=True)
        return
    print("make quickstart: measuring how long it takes here ...", flush=True)
    for name, outcome in expect(quickstart_alone=True).items():
        print(f"{name}: {outcome.detail}", flush=True)


def require_program(path: str) -> str:
    """The training program that a configuration is for.

    Raises:
        UserError: it cannot be read, or is for no program.
    """
    program = config.program_of(path)
    if program not in config.PROGRAMS:
        raise UserError(f"--config takes a file of {', '.join(config.PROGRAMS)}. {path} is of {program or 'none of them'}")
    return program


# --- what works -----------------------------------------------------------------------------------------------------


def probe_all() -> dict[str, Outcome]:
    """Run every probe and import every verb's module, two processes at a time."""
    modules = [module for module, _ in VERBS.values()]
    codes = [*PROBES.values(), f"names = {modules!r}\n{IMPORT_ALL}"]
    with ThreadPoolExecutor(2) as pool:
        limits = [COMPILE_TIMEOUT if name == "torch.compile" else TIMEOUT for name in (*PROBES, "modules")]
        *tried, imported = pool.map(probe, codes, limits)
    faults = json.loads(imported.detail) if imported.works else dict.fromkeys(modules, imported.detail)
    modules_tried = {name: Outcome(name not in faults, faults.get(name, "imports")) for name in modules}
    return dict(zip(PROBES, tried, strict=True)) | modules_tried


def probe(code: str, timeout_seconds: float) -> Outcome:
    """Run Python code in a process of its own. The detail is its last line, or its error."""
    environ = os.environ | {"PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env=environ,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return Outcome(False, f"no answer within {timeout_seconds:g} s")
    if done.returncode == 0:
        return Outcome(True, done.stdout.strip().splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed)\b", line)]
    return Outcome(False, (errors or lines or [f"the process ended with {done.returncode}"])[-1])


def expect(path: str | None = None, *, quickstart_alone: bool = False) -> dict[str, Outcome]:
    """Estimates from a few real steps in a process of its own, by their subject. ``steps`` fails if the steps do."""
    tried = probe(ESTIMATE.format(path=path, quickstart_alone=quickstart_alone), ESTIMATE_TIMEOUT)
    if not tried.works:
        return {"steps": tried}
    return {line["what"]: Outcome(True, line["text"], slow=line["is_slow"]) for line in json.loads(tried.detail)}


def find_compiler() -> Outcome:
    """The C++ compiler that torch.compile and DeepSpeed's extensions would use, and ninja."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "c++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    return Outcome(bool(compiler), f"{compiler or f'no C++ compiler ({names[0]})'}; {ninja or 'no ninja'}")


def check_disk(directory: Path) -> Outcome:
    """Whether there is room for a run, and permission to write."""
    if not os.access(directory, os.W_OK):
        return Outcome(False, f"{directory} may not be written")
    free = shutil.disk_usage(directory).free
    return Outcome(free >= MIN_FREE_BYTES, f"{gib(free)} free")


def try_shards(root: str) -> tuple[Outcome, UserError | None]:
    """List the shards, open the index and decode the first image. An error is the outcome and is returned too."""
    try:
        import numpy as np

        from personmae.data.decode import BadImage, decode_onto
        from personmae.data.shard_set import ShardSet
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return Outcome(False, f"not tried: {error}"), UserError(f"shards cannot be read without working packages: {error}")
    with tempfile.TemporaryDirectory(prefix="personmae-doctor-") as cache:
        try:
            start = time.perf_counter()
            with ShardSet(root, cache) as shards:
                opened = time.perf_counter()
                (height, width), _ = decode_onto(shards.jpeg(0), np.empty((256, 128, 3), np.uint8))
                read = time.perf_counter()
                first = shards.shards[0].num_bytes / 2**20
                there = f"{counted(len(shards), 'image')} in {counted(len(shards.shards), 'shard')}"
                detail = (
                    f"{there}, listing and index {_ms(opened - start)}, "
                    f"first image ({height} x {width}, of a shard of {first:.1f} MiB) {_ms(read - opened)}"
                )
            return Outcome(True, detail), None
        except (UserError, BadImage, OSError, IndexError) as error:
            message = without_secrets(str(error))
            return Outcome(False, message), UserError(f"the shards at {without_secrets(root)} cannot be read: {message}")


def commands(outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    """Each verb, with the first thing that would stop it and the remedy."""
    found = {}
    for verb, (module, needs) in VERBS.items():
        failed = next((need for need in needs if need in outcomes and not outcomes[need].works), None)
        if failed:
            found[verb] = Outcome(False, f"{failed}: {outcomes[failed].detail}; {REMEDIES[failed]}")
        elif not outcomes[module].works:
            found[verb] = Outcome(False, f"{module} does not import: {outcomes[module].detail}")
        else:
            found[verb] = Outcome(True, "")
    return found


# --- output -------------------------------------------------------------------------------------------------


def print_facts(console: Console, title: str, found: dict[str, str]) -> None:
    """Print a table of names and facts."""
    table = _table(console, title)
    for name, text in found.items():
        table.add_row(name, Text(text))
    console.print(table)


def print_outcomes(console: Console, title: str, outcomes: dict[str, Outcome]) -> None:
    """Print a table of names, ok or not, and details."""
    table = _table(console, title)
    for name, outcome in outcomes.items():
        status = "[yellow]slow[/]" if outcome.slow else "[green]ok[/]"
        table.add_row(Text(name), status if outcome.works else "[red]fails[/]", Text(outcome.detail))
    console.print(table)


def _table(console: Console, title: str) -> Table:
    console.print(f"[bold]{title}[/]")  # the table's own title would be wrapped to the table's width
    return Table(show_header=False, box=ROUNDED)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms"
