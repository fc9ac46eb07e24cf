"""What the quickstart's choices are worth: mask, batch, steps and decoders, each by frozen features and by fine-tuning.

    python benchmarks/quickstart_sweep.py                     # all arms with seed 0: 2.5 hours on 2 CPU cores; resumable
    python benchmarks/quickstart_sweep.py quickstart half     # these alone

Writes ``benchmarks/results/quickstart_sweep.json``, a row for each arm: the pixel loss at the end, mAP of the probe's two
readings of frozen features, and mAP of MGN after the quickstart's fine-tuning. The people are the quickstart's own (seed 0), so
the choice is made here and confirmed on others by ``four_settings.py``.
"""

import argparse
import json
from pathlib import Path

from quickstart_runs import MAE, MODEL, ROOT, brief, personmae, read

from personmae.monitor import environment, run_log

RUNS = ROOT / "runs" / "sweep"
RESULTS = ROOT / "benchmarks" / "results" / "quickstart_sweep.json"
TARGET = RUNS / "data" / "market1501"
_BATCH_32 = ("train.global_batch_size=32", "train.max_micro_batch_size=32")
PRETRAINING: dict[str, tuple[str, ...]] = {
    "quickstart": (),
    "half": ("train.total_steps=2400",),
    "four times": ("train.total_steps=19200",),
    "batch 32": (*_BATCH_32, "train.total_steps=2400"),
    "batch 32, half": (*_BATCH_32, "train.total_steps=1200"),
    "rate of 2e-3": ("optim.lr=2e-3",),
    "rate of 5e-4": ("optim.lr=5e-4",),
    "blocks alone": ("mask.block_ratio=null",),
    "blocks .4": ("mask.block_ratio=0.4",),
    "no blocks": ("mask.block_ratio=0",),
    "person mask": ("mask.kind=person", "mask.block_ratio=null"),
    "decoders of 2": ("decoders.depth=2",),
    "visible positions": ("decoders.visible_positions=true",),
    "no feature loss": ("loss.feature_weight=0",),
    "identity loss": ("loss.identity_weight=0.1",),
    "MAE-like": MAE,
    "MAE-like, half": (*MAE, "train.total_steps=2400"),
}
FINE_TUNING: dict[str, tuple[str, ...]] = {
    "": (),
    ", fine-tuned at 5e-4": ("optim.lr=5e-4",),
    ", fine-tuned at 2e-3": ("optim.lr=2e-3",),
}


def arm(name: str, init: str | Path) -> dict[str, float]:
    """Frozen and fine-tuned scores of one start."""
    folder = RUNS / name.replace(" ", "_").replace(",", "")
    if not (folder / "probe" / "result.json").is_file():
        options = MODEL if init == "random" else ()
        personmae("evaluate", init, "market1501", TARGET, "--probe", "--out", folder / "probe", *options)
    found = {kind: brief(scores)["mAP"] for kind, scores in read(folder / "probe")["probe"].items()}
    if init != "random":
        losses = [record["pixel_loss"] for record in run_log.read_records(str(init)) if "pixel_loss" in record]
        found["pixel_loss"] = round(losses[-1], 4)
    chosen = FINE_TUNING if name in ("random", "quickstart") else {"": ()}
    for kind, changes in chosen.items():
        run_dir = folder / f"mgn{kind.replace(' ', '_').replace(',', '')}"
        where = [f"run_dir={run_dir}", f"root={TARGET}", f"init={init}"]
        personmae("finetune", "configs/quickstart_personmae.yaml", *where, *changes)
        found[f"MGN{kind}"] = brief(read(run_dir))["mAP"]
    return found


def main() -> None:
    """Make the data, train what is not there yet, and write the rows after each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of random, {', '.join(PRETRAINING)} (default all)")
    names = parser.parse_args().arms or ["random", *PRETRAINING]
    if unknown := [name for name in names if name not in PRETRAINING and name != "random"]:
        parser.error(f"an arm is one of random, {', '.join(PRETRAINING)}; got {unknown[0]}")
    personmae("synth", RUNS / "data")
    personmae("shards", "write", RUNS / "data" / "pool", RUNS / "shards", "--shard-mb", "8", "--if-missing")
    known = {"commit": environment.git_commit(), "hardware": environment.describe_hardware()}
    rows: dict[str, dict] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in names:
        init: str | Path = "random"
        if name != "random":
            init = RUNS / name.replace(" ", "_").replace(",", "") / "pretrain"
            where = [f"run_dir={init}", f"data.shards={RUNS / 'shards'}"]
            personmae("pretrain", "configs/quickstart.yaml", *where, *PRETRAINING[name])
        rows[name] = arm(name, init) | known
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
