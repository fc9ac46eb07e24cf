"""An import that is killed ten times at random moments, against an undisturbed one: every byte must be the same.

    python benchmarks/conversion_kills.py --images 100000          # a few minutes on 2 CPU cores

Draws synthetic crops, writes them as shards with ``personmae shards write``, then again while SIGKILL hits the whole process
group at seeded random moments, and compares all files. Writes ``benchmarks/results/conversion_kills.json``.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from personmae.monitor.environment import describe_hardware, git_commit
from personmae.synthetic.benchmarks import SynthSettings, write_synthetic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "conversion_kills.json"
NUM_KILLS = 10


def start(source: Path, out: Path, shard_mb: float) -> subprocess.Popen[bytes]:
    """The command as the leader of a process group."""
    command = [sys.executable, "-m", "personmae", "shards", "write", source, out, "--shard-mb", shard_mb]
    with out.with_name("log.txt").open("ab") as log:
        return subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def finish(command: subprocess.Popen[bytes], out: Path) -> None:
    """Wait for an import that must succeed."""
    if command.wait():
        log = out.with_name("log.txt").read_text(encoding="utf-8")
        raise SystemExit(f"an import that was not killed ended with code {command.returncode}:\n{log[-2000:]}")


def finished_shards(out: Path) -> int:
    """Shards that are recorded as finished."""
    partial = out.with_name(f"{out.name}.partial")
    return len(list(partial.glob("import-*.json"))) if partial.exists() else 0


def undisturbed(source: Path, out: Path, shard_mb: float) -> tuple[float, float]:
    """Write without interruption; returns the seconds until the first shard is finished, and until the end."""
    begun = time.monotonic()
    command = start(source, out, shard_mb)
    startup = wait_for_shards(command, out, 1)
    finish(command, out)
    return startup, time.monotonic() - begun


def wait_for_shards(command: subprocess.Popen[bytes], out: Path, wanted: int) -> float:
    """Wait until so many shards are finished, or the command is; returns the seconds."""
    begun = time.monotonic()
    while finished_shards(out) < wanted and command.poll() is None:
        time.sleep(0.005)
    return time.monotonic() - begun


def killed(source: Path, out: Path, shard_mb: float, times: tuple[float, float], chance: random.Random) -> list[dict]:
    """Kill ten times; returns when, and what was finished by then.

    Each kill comes a random time after a random number of more shards, or, where that number is 0, at a random moment of the
    program's start. ``times`` are those of the undisturbed import.
    """
    startup, seconds = times
    num_shards = len(list(out.with_name("undisturbed").glob("*.mds")))
    most = max(1, round(1.2 * num_shards / NUM_KILLS))  # so that ten kills leave some work
    kills = []
    for _ in range(NUM_KILLS):
        before, more = finished_shards(out), chance.randrange(most + 1)
        pause = chance.uniform(0, 2 * (seconds - startup) / num_shards if more else startup)
        begun = time.monotonic()
        command = start(source, out, shard_mb)
        wait_for_shards(command, out, before + more)
        time.sleep(pause)
        if command.poll() is not None:
            break
        os.killpg(command.pid, signal.SIGKILL)
        command.wait()
        kills.append({"seconds_after_start": round(time.monotonic() - begun, 3), "shards_finished": finished_shards(out)})
    return kills


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def main() -> None:
    """Draw, write, write under kills, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--shard-mb", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, help="directory for images and shards (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="conversion-kills-") as temporary:
        result = measure((args.work or Path(temporary)).resolve(), args.images, args.shard_mb, args.seed)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"), end="")
    if not result["identical"]:
        raise SystemExit("the bytes differ")


def measure(work: Path, num_images: int, shard_mb: float, seed: int) -> dict:
    """The record of the whole comparison."""
    processes = os.cpu_count() or 1
    write_synthetic(work / "data", SynthSettings(pool_images=num_images), num_processes=processes)
    source, whole, disturbed = work / "data" / "pool", work / "undisturbed", work / "killed"
    for left in (whole, disturbed, work / "undisturbed.partial", work / "killed.partial"):
        shutil.rmtree(left, ignore_errors=True)
    startup, seconds = undisturbed(source, whole, shard_mb)
    kills = killed(source, disturbed, shard_mb, (startup, seconds), random.Random(seed))
    if disturbed.exists():
        raise SystemExit(f"the import ended before kill {len(kills) + 1} of {NUM_KILLS}; take more --images")
    begun = time.monotonic()
    finish(start(source, disturbed, shard_mb), disturbed)
    finish_seconds = time.monotonic() - begun
    expected, found = digests(whole), digests(disturbed)
    return {
        "commit": git_commit(),
        "hardware": describe_hardware(),
        "versions": {name: version(name) for name in ("mosaicml-streaming", "simplejpeg", "numpy")}
        | {"python": platform.python_version()},
        "images": num_images,
        "shard_mb": shard_mb,
        "seed": seed,
        "files": len(expected),
        "bytes": sum(path.stat().st_size for path in whole.iterdir()),
        "undisturbed_seconds": round(seconds, 2),
        "images_per_second": round(num_images / (seconds - startup)),
        "kills": kills,
        "last_run_seconds": round(finish_seconds, 2),
        "identical": expected == found,
    }


if __name__ == "__main__":
    main()
