"""The four downstream settings on synthetic people with one pre-trained encoder, over seeds and on one and two processes.

    python benchmarks/four_settings.py               # on 2 idle CPU cores; resumable

Writes ``benchmarks/results/four_settings.json``. The data and the pre-training are the quickstart's; the target is the
benchmark in Market-1501's layout, the source of domain adaptation the one in Occluded-Duke's.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "settings"
RESULTS = ROOT / "benchmarks" / "results" / "four_settings.json"
TARGET, SOURCE = RUNS / "data" / "market1501", RUNS / "data" / "occluded_duke"
PRETRAINED = RUNS / "pretrain"
SCORES = ("mAP", "rank1", "mINP")


def personmae(*args: str | Path) -> None:
    """Run a verb; its output goes to the terminal."""
    subprocess.run([sys.executable, "-m", "personmae", *map(str, args)], cwd=ROOT, check=True)


def train(program: str, config: str, run_dir: Path, *overrides: str, ranks: int = 1) -> dict:
    """A program on so many ranks, unless it has its result; returns that."""
    settings = [f"configs/{config}.yaml", f"run_dir={run_dir}", *overrides]
    if ranks == 1:
        personmae(program, *settings)
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        subprocess.run([*launcher, f"launcher/{program}.py", "--config", *settings], cwd=ROOT, check=True)
    return json.loads((run_dir / "result.json").read_text(encoding="utf-8"))


def settings_of(seed: int, ranks: int) -> dict[str, dict]:
    """The results of all settings with one seed on so many ranks."""
    suffix, bn = f"seed{seed}_ranks{ranks}", "train.bn_group_size=32"  # the same for one and two ranks
    source = RUNS / f"source_{suffix}"
    common = {"ranks": ranks}
    at_target, started = f"root={TARGET}", f"init={PRETRAINED}"
    train("finetune", "quickstart_source", source, f"root={SOURCE}", started, f"seed={seed}", bn, **common)
    personmae("evaluate", source, "market1501", TARGET, "--out", RUNS / f"transfer_{suffix}")
    found = {
        "supervised": train(
            "finetune", "quickstart_personmae", RUNS / f"supervised_{suffix}", at_target, started, f"seed={seed}", bn, **common
        ),
        "supervised, occluded": json.loads((source / "result.json").read_text(encoding="utf-8")),
        "UDA": train(
            "unsupervised", "quickstart_uda", RUNS / f"uda_{suffix}", at_target, f"init={source}", f"seed={seed}", **common
        ),
        "USL": train("unsupervised", "quickstart_usl", RUNS / f"usl_{suffix}", at_target, started, f"seed={seed}", **common),
        "source alone": json.loads((RUNS / f"transfer_{suffix}" / "result.json").read_text(encoding="utf-8")),
    }
    return {name: {score: record[score] for score in SCORES} for name, record in found.items()}


def main() -> None:
    """Make the data, train everything that is not there yet, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes (default 1 2)")
    args = parser.parse_args()
    personmae("synth", RUNS / "data")
    personmae("shards", "write", RUNS / "data" / "pool", RUNS / "shards", "--shard-mb", "8", "--if-missing")
    personmae("pretrain", "configs/quickstart.yaml", f"run_dir={PRETRAINED}", f"data.shards={RUNS / 'shards'}")
    personmae("evaluate", PRETRAINED, "market1501", TARGET, "--pool", "mean", "--out", RUNS / "untrained")
    untrained = json.loads((RUNS / "untrained" / "result.json").read_text(encoding="utf-8"))
    runs = {f"seed {s}, {r} ranks": settings_of(s, r) for r in args.ranks for s in args.seeds}
    run = json.loads((PRETRAINED / "run.json").read_text(encoding="utf-8"))
    record: dict = {name: run[name] for name in ("commit", "hardware", "versions")}
    record["no training"] = {score: untrained[score] for score in SCORES}
    for ranks in args.ranks:
        chosen = [runs[f"seed {seed}, {ranks} ranks"] for seed in args.seeds]
        values = {name: [found[name]["mAP"] for found in chosen] for name in chosen[0]}
        record[f"mAP on {ranks} ranks"] = {
            name: {"mean": statistics.mean(of), "min": min(of), "max": max(of)} for name, of in values.items()
        }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record | {"runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
