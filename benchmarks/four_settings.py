"""The four downstream settings on synthetic people, over seeds, each beside its control.

    python benchmarks/four_settings.py --seeds 1     # one seed: about half an hour on 2 CPU cores with AVX2
    python benchmarks/four_settings.py               # three seeds; resumable, and finished runs are kept

Everything is the quickstart's own configuration. The people are those of a synthetic seed on which no choice was made. Each
training seed pre-trains anew. The target is the benchmark in Market-1501's layout, the source of domain adaptation the one in
Occluded-Duke's. ``benchmarks/results/four_settings.json`` has each seed, and the mean, the range and a 95 % interval.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from quickstart_runs import MAE, MODEL, ROOT, brief, personmae, read
from scipy.stats import t as student

from personmae.monitor import environment

RUNS = ROOT / "runs" / "settings"
RESULTS = ROOT / "benchmarks" / "results" / "four_settings.json"
TARGET, SOURCE = RUNS / "data" / "market1501", RUNS / "data" / "occluded_duke"
DATA_SEED = 5  # the quickstart's is 0
BASELINES = ("histogram", "thumbnail", "thumbnail+histogram")


def evaluate(name: str, subject: str | Path, *options: str) -> dict:
    """The record of an evaluation on the target, made once."""
    out = RUNS / name
    if not (out / "result.json").is_file():
        personmae("evaluate", subject, "market1501", TARGET, "--out", out, *options)
    return read(out)


def train(program: str, config: str, name: str, root: Path, init: str | Path, seed: int) -> dict[str, float]:
    """What a training of the quickstart's configurations ends with, from one start."""
    run_dir = RUNS / name
    personmae(program, f"configs/{config}.yaml", f"run_dir={run_dir}", f"root={root}", f"init={init}", f"seed={seed}")
    return brief(read(run_dir))


def pretrained(name: str, seed: int, *changes: str) -> Path:
    """A pre-training on the synthetic pool in the quickstart's setting but for ``changes``."""
    run_dir = RUNS / f"{name}_seed{seed}"
    personmae(
        "pretrain", "configs/quickstart.yaml", f"run_dir={run_dir}", f"data.shards={RUNS / 'shards'}", f"seed={seed}", *changes
    )
    return run_dir


def settings_of(seed: int, *, mae: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Every setting and its control with one seed, by name, as they come."""
    starts: dict[str, str | Path] = {"random": "random", "PersonMAE": pretrained("pretrain", seed)}
    if mae:
        starts["MAE-like"] = pretrained("mae", seed, *MAE)
    for start, init in starts.items():
        options = [*MODEL, "--seed", str(seed)] if init == "random" else []
        for kind, scores in evaluate(f"probe_{start}_seed{seed}", init, "--probe", *options)["probe"].items():
            yield f"frozen, {kind}, {start}", brief(scores)
        alike = ["--pool", "rows", "--per-camera", "standardise", *options]  # treated as the baselines are
        yield f"frozen, standardised, {start}", brief(evaluate(f"frozen_{start}_seed{seed}", init, *alike))
        yield (
            f"supervised, {start}",
            train("finetune", "quickstart_personmae", f"supervised_{start}_seed{seed}", TARGET, init, seed),
        )
    for start in ("random", "PersonMAE"):
        source = RUNS / f"source_{start}_seed{seed}"
        occluded = train("finetune", "quickstart_source", source.name, SOURCE, starts[start], seed)
        yield f"supervised occluded, {start}", occluded
        yield f"source alone, {start}", brief(evaluate(f"transfer_{start}_seed{seed}", source))
        yield f"UDA, {start}", train("unsupervised", "quickstart_uda", f"uda_{start}_seed{seed}", TARGET, source, seed)
        yield f"USL, {start}", train("unsupervised", "quickstart_usl", f"usl_{start}_seed{seed}", TARGET, starts[start], seed)


def summarise(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean mAP over seeds, its range, and the half width of a 95 % interval by Student's t."""
    summary = {}
    for name in dict.fromkeys(name for by_name in found.values() for name in by_name):
        values = [by_name[name]["mAP"] for by_name in found.values() if name in by_name]
        summary[name] = {
            "mean": round(statistics.fmean(values), 2),
            "min": min(values),
            "max": max(values),
            "seeds": len(values),
        }
        if len(values) > 1:
            half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
            summary[name]["interval"] = round(float(half), 2)
    return summary


def main() -> None:
    """Make the data, train everything that is not there yet, and write the record after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--mae", action="store_true", help="also a pre-training like MAE, of equal images")
    args = parser.parse_args()
    personmae("synth", RUNS / "data", "--seed", str(DATA_SEED))
    personmae("shards", "write", RUNS / "data" / "pool", RUNS / "shards", "--shard-mb", "8", "--if-missing")
    record: dict = {"commit": environment.git_commit(), "hardware": environment.describe_hardware(), "data_seed": DATA_SEED}
    record["baselines"] = {name: brief(evaluate(f"baseline_{name}", name)) for name in BASELINES}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for seed in args.seeds:
        for name, scores in settings_of(seed, mae=args.mae):
            found.setdefault(f"seed {seed}", {})[name] = scores
            RESULTS.write_text(json.dumps(record | {"mAP": summarise(found), "runs": found}, indent=1) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
