"""What the README's commands take on a fresh clone: minutes, peak memory, and what they end with.

    python benchmarks/commands.py quickstart test            # nothing may run beside it
    python benchmarks/commands.py quickstart --as avx2       # the libraries behave as on a processor without AVX-512 and bf16

Each command runs in one clone of the committed tree, after an install that is timed too. Adds a row for each to
``benchmarks/results/commands.json``; a row of the same command, commit and processor is replaced.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from personmae.monitor import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "commands.json"
COMMANDS = {
    "install": ["make", "install", "checkov"],
    "quickstart": ["make", "quickstart"],
    "test": ["make", "test"],
    "ci": ["bash", ".ci/run"],
}
AS = {
    "here": {},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def measure(name: str, clone: Path, environ: dict[str, str]) -> dict:
    """Run one command in the clone; its output goes to the terminal and the record."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start, lines = time.monotonic(), []
    process = subprocess.Popen(
        COMMANDS[name],
        cwd=clone,
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    for line in process.stdout or ():
        sys.stdout.write(line)
        lines.append(line)
    code, after = process.wait(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "command": " ".join(COMMANDS[name]),
        "exit_code": code,
        "minutes": round((time.monotonic() - start) / 60, 2),
        "cpu_minutes": round((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60, 2),
        "peak_process_gb": round(after.ru_maxrss * 1024 / 1e9, 2),  # of this command or one before it
        **ending("".join(lines), clone),
    }


def ending(output: str, clone: Path) -> dict:
    """What a command ended with: counts of tests, or the scores of the quickstart."""
    found: dict = {}
    if counts := re.findall(r"(?m)^=*\s*((?:\d+ (?:passed|failed|skipped|deselected|errors?)(?:, )?)+)", output):
        found["tests"] = counts
    for result in sorted((clone / "runs" / "quickstart").glob("*/result.json")):
        found.setdefault("mAP", {})[result.parent.name] = round(json.loads(result.read_text(encoding="utf-8"))["mAP"] * 100, 1)
    return found


def add(rows: list[dict]) -> None:
    """Put rows into the record, in place of older ones of the same kind."""
    kinds = [{key: row[key] for key in ("command", "commit", "as")} for row in rows]
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    kept = [row for row in kept if {key: row[key] for key in ("command", "commit", "as")} not in kinds]
    RESULTS.write_text(json.dumps([*kept, *rows], indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Clone, install, run what is asked for, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", choices=list(COMMANDS))
    parser.add_argument("--as", dest="processor", choices=list(AS), default="here", help="processor to behave as")
    args = parser.parse_args()
    known = {"commit": environment.git_commit(), "as": args.processor, "hardware": environment.describe_hardware()}
    folder = Path(tempfile.mkdtemp(prefix="personmae-clone-"))
    clone = folder / "personmae"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    for name in dict.fromkeys(["install", *args.commands]):
        add([measure(name, clone, AS[args.processor]) | known | {"date": time.strftime("%Y-%m-%d")}])
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
