"""The method on real people: your own copy of Market-1501's training set, split by identity. Numbers only, never images.

    python benchmarks/real_people.py DATA/Market-1501-v15.09.15/bounding_box_train \\
        --drawn runs/quickstart/pretrain --source runs/quickstart/finetune_personmae

About two hours a seed on 2 CPU cores. Interrupt it at will: the same command goes on where it was. FOLDER holds crops in
Market-1501's names. Half of the identities are trained on, the other half is searched. This split is our own: its numbers are
comparable with nothing published. ``benchmarks/results/real_people.json`` has, for each start and seed, the probe of frozen
features and MGN after a short fine-tuning, beside baselines without training, USL and domain adaptation. Starts are random
weights, ``--drawn`` (a pre-training on drawn people), and pre-training on the training half: PersonMAE in the quickstart's
setting, and one like MAE of equal images (random mask, no shift, no feature loss). ``--source`` is a fine-tuning on drawn
people.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from quickstart_runs import MAE, MODEL, ROOT, brief, personmae, read

from personmae.errors import UserError, run_program
from personmae.monitor import environment, run_log

RESULTS = ROOT / "benchmarks" / "results" / "real_people.json"
NAME = re.compile(r"(?P<pid>-1|\d+)_c(?P<camid>\d+)s\d+_\d+_\d+\.jpg")
SPLIT_SEED = 0
PRETRAININGS = {
    "personmae": (),
    "mae": MAE,
}
BASELINES = {
    "histogram": ("histogram",),
    "thumbnail": ("thumbnail",),
    "thumbnail, whitened": ("thumbnail", "--per-camera", "whiten"),
    "thumbnail+histogram": ("thumbnail+histogram",),
    "thumbnail+histogram, whitened": ("thumbnail+histogram", "--per-camera", "whiten"),
}
Scores = dict[str, Any]


# --- the split ------------------------------------------------------------------------------------------------------


def split_by_identity(names: Sequence[str], seed: int = SPLIT_SEED) -> dict[str, list[str]]:
    """File names of Market-1501 by the folder that each goes to.

    The identities are put into a random order by ``seed``; the first half, rounded up, is trained on. Of each other identity
    the first image of each camera, in the order of names, is a query, and the rest is the gallery.

    Raises:
        UserError: a name is not Market-1501's, or there are fewer than two identities.
    """
    by_pid: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for name in sorted(names):
        match = NAME.fullmatch(name)
        if not match:
            raise UserError(f"images named as in Market-1501 are required, such as 0002_c1s1_000451_03.jpg; got {name}")
        if int(match["pid"]) > 0:  # neither junk nor a distractor
            by_pid[int(match["pid"])].append((int(match["camid"]), name))
    if len(by_pid) < 2:
        raise UserError(f"two identities or more are required; got {len(by_pid)}")
    order = np.random.default_rng(seed).permutation(sorted(by_pid)).tolist()
    half = (len(order) + 1) // 2
    found: dict[str, list[str]] = {"bounding_box_train": [], "query": [], "bounding_box_test": []}
    found["bounding_box_train"] = sorted(name for pid in order[:half] for _, name in by_pid[pid])
    for pid in sorted(order[half:]):
        seen: set[int] = set()
        for camid, name in by_pid[pid]:
            found["bounding_box_test" if camid in seen else "query"].append(name)
            seen.add(camid)
    return found


def write_split(folder: Path, root: Path) -> dict[str, int]:
    """Link the images of ``folder`` below ``root`` in Market-1501's layout, or copy them; returns how many there are of each.

    Raises:
        UserError: there are no such images, or ``root`` holds another split.
    """
    if not folder.is_dir():
        raise UserError(f"a folder of real crops in Market-1501's names is required; {folder} is none")
    split = split_by_identity([name for name in os.listdir(folder) if name.lower().endswith(".jpg")])
    for part, names in split.items():
        (root / part).mkdir(parents=True, exist_ok=True)
        if others := sorted(set(os.listdir(root / part)) - set(names)):
            raise UserError(f"{root / part} holds other images (first: {others[0]}); give another --work")
        for name in names:
            _link(folder / name, root / part / name)
    return {part: len(names) for part, names in split.items()}


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:  # another disk
        partial = target.with_suffix(".partial")
        shutil.copyfile(source, partial)
        partial.replace(target)


# --- the runs -------------------------------------------------------------------------------------------------------


class Bench:
    """Runs below one folder, each of which is skipped or goes on when it is there already, and the record of all."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.work = args, args.work.resolve()
        self.root = self.work / "market1501"
        self.record: dict[str, Any] = {"commit": environment.git_commit(), "hardware": environment.describe_hardware()}
        self.record |= {"images": write_split(args.folder, self.root), "split_seed": SPLIT_SEED}
        self.record["settings"] = {name: getattr(args, name) for name in ("pretrain", "finetune", "unsupervised")}
        self.record |= {"baselines": {}, "starts": defaultdict(dict), "without labels": defaultdict(dict)}

    def run(self) -> None:
        """Everything, with the record written after each part."""
        personmae("shards", "write", self.root / "bounding_box_train", self.work / "shards", "--shard-mb", "8", "--if-missing")
        for name, arguments in BASELINES.items():
            self.record["baselines"][name] = brief(self.evaluate(f"baseline {name}", *arguments))
        self.save()
        for seed in self.args.seeds:
            for start, init in self.starts(seed):
                self.record["starts"][start][f"seed {seed}"] = self.measure(start, init, seed)
                self.save()
            for name, init in self.learners(seed):
                self.record["without labels"][name][f"seed {seed}"] = self.learn(name, init, seed)
                self.save()

    def starts(self, seed: int) -> Iterator[tuple[str, str]]:
        """What is fine-tuned and probed, by name; each pre-training runs when its turn comes."""
        yield "random", "random"
        if self.args.drawn:
            yield "drawn", str(self.args.drawn.resolve())
        for name, changes in PRETRAININGS.items():
            yield name, str(self.pretrain(name, changes, seed))

    def learners(self, seed: int) -> Iterator[tuple[str, str]]:
        """What learns without labels on the training half, by name."""
        yield "USL from random", "random"
        yield "USL from personmae", str(self.work / f"personmae_seed{seed}")
        if self.args.drawn:
            yield "USL from drawn", str(self.args.drawn.resolve())
        if self.args.source:
            yield "UDA from drawn", str(self.args.source.resolve())

    def pretrain(self, name: str, changes: Sequence[str], seed: int) -> Path:
        """A pre-training on the training half, in the quickstart's setting but for ``changes``."""
        run_dir = self.work / f"{name}_seed{seed}"
        settings = [f"run_dir={run_dir}", f"data.shards={self.work / 'shards'}", f"seed={seed}", *changes]
        personmae("pretrain", "configs/quickstart.yaml", *settings, *self.args.pretrain)
        return run_dir

    def measure(self, start: str, init: str, seed: int) -> Scores:
        """The probe of a start, and MGN fine-tuned from it."""
        options = [*MODEL, "--seed", seed] if init == "random" else []
        probed = self.evaluate(f"probe {start} seed{seed}", init, "--probe", *options)
        found: Scores = {name: brief(scores) for name, scores in probed["probe"].items()}
        if init != "random" and (losses := [r["pixel_loss"] for r in run_log.read_records(init) if "pixel_loss" in r]):
            found["pixel_loss"] = losses[-1]
        run_dir = self.work / f"mgn_{start}_seed{seed}"
        settings = [f"run_dir={run_dir}", f"root={self.root}", f"init={init}", f"seed={seed}", "train.epochs=5"]
        personmae("finetune", "configs/quickstart_personmae.yaml", *settings, *self.args.finetune)
        return found | {"mgn": brief(read(run_dir))}

    def learn(self, name: str, init: str, seed: int) -> Scores:
        """Unsupervised training, and for domain adaptation what its source finds alone."""
        kind = "uda" if name.startswith("UDA") else "usl"
        run_dir = self.work / f"{name.replace(' ', '_')}_seed{seed}"
        settings = [f"run_dir={run_dir}", f"root={self.root}", f"init={init}", f"seed={seed}"]
        personmae("unsupervised", f"configs/quickstart_{kind}.yaml", *settings, *self.args.unsupervised)
        found: Scores = {kind: brief(read(run_dir))}
        if kind == "uda":
            found["source alone"] = brief(self.evaluate("source alone", init))
        return found

    def evaluate(self, name: str, subject: str | Path, *options: object) -> Scores:
        """The record of an evaluation on the searched half, which is made once for each step that a run has reached."""
        out = self.work / "results" / re.sub(r"[^\w+]+", "_", name)
        if not (out / "result.json").is_file():
            personmae("evaluate", subject, "market1501", self.root, "--out", out, *options)
        return read(out)

    def save(self) -> None:
        """Write what there is so far, with means over seeds."""
        path: Path = self.args.out
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record | {"means": means(self.record)}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")


def means(record: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, least and largest mAP over seeds, by start and by what was measured."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for start, by_seed in (*record["starts"].items(), *record["without labels"].items()):
        values: dict[str, list[float]] = defaultdict(list)
        for measured in by_seed.values():
            for name, scores in measured.items():
                values[name].append(scores["mAP"] if isinstance(scores, dict) else scores)
        found[start] = {
            name: {"mean": round(statistics.fmean(of), 3), "min": round(min(of), 3), "max": round(max(of), 3), "seeds": len(of)}
            for name, of in values.items()
        }
    return found


def main() -> None:
    """Split, train and measure what is not there yet, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="real crops, such as Market-1501's bounding_box_train")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "real", help="where the split and the runs go")
    parser.add_argument("--drawn", type=Path, metavar="RUN", help="a pre-training on drawn people of the quickstart's size")
    parser.add_argument("--source", type=Path, metavar="RUN", help="a fine-tuning on drawn people, for domain adaptation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    for program in ("pretrain", "finetune", "unsupervised"):
        parser.add_argument(f"--{program}", nargs="+", default=[], metavar="a.b=c", help=f"other settings of each {program}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record (default benchmarks/results/real_people.json)")
    args = parser.parse_args()
    Bench(args).run()
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run_program(main))
