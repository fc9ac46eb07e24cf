"""Folders as programs leave them, written by hand: what a report reads of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from personmae import config
from personmae.checkpoint import portable

DRAWN = {
    "benchmark_digest": "d" * 16,
    "benchmark_title": "synthetic people, Market-1501 layout, 300 identities",
    "synthetic": True,
    "counts": {"query": [4, 2], "gallery": [20, 2]},
}
UNTOLD: dict[str, Any] = {"benchmark_digest": None, "benchmark_title": None, "synthetic": None, "counts": {}}  # older records
SCORES = {"rank1": 0.5, "rank5": 0.7, "rank10": 0.8, "mINP": 0.1, "cmc": [0.5, 0.6, 0.65, 0.7, 0.8]}
COUNTS = {"num_queries": 4, "num_valid": 4, "num_gallery": 20, "seconds": 1.5, "commit": None, "benchmark": "market1501"}
HARDWARE = {"cpu": "a <processor>", "cores": 2, "memory_bytes": 2**33, "gpus": ["GPU-9000"]}
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run into ``tmp_path / name``: fine-tuned, or evaluated alone where ``init`` is None."""

    def make(
        name: str,
        *,
        init: str | None = "random",
        ap: list[float | None] | None = None,
        step: int = 40,
        total: int = 40,
        overrides: dict[str, Any] | None = None,
        session: dict[str, Any] | None = None,
        **result: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        mean = [value for value in ap or [] if value is not None]
        record = SCORES | COUNTS | DRAWN | {"name": Path(name).name, "init": init or "colour alone", "root": "gone"}
        record |= {"mAP": sum(mean) / len(mean) if mean else 0.25} | result
        (folder / "result.json").write_text(json.dumps(record), encoding="utf-8")
        if ap:
            queries = {"benchmark_digest": record["benchmark_digest"], "ap": ap}
            (folder / "queries.json").write_text(json.dumps(queries), encoding="utf-8")
        if init is not None:
            fields = {"run_dir": str(folder), "root": "gone", "init": init} | (overrides or {})
            write_training(folder, config.Finetune.model_validate(fields), step=step, total=total, session=session)
        return folder

    return make


def write_training(
    folder: Path, settings: config.Pretrain | config.Finetune, *, step: int, total: int, session: dict[str, Any] | None = None
) -> None:
    """What a training leaves at ``step`` of ``total``: set-up, a record, and a checkpoint's state."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.dump_yaml(settings), encoding="utf-8")
    info: dict[str, Any] = {"command": "personmae finetune a.yaml", "config_hash": "c0ffee", "seed": settings.seed}
    info |= {"commit": "abc", "versions": {"torch": "9.9"}, "hardware": HARDWARE}
    info |= {"sessions": [session]} if session else {}
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    lines = [{"step": s, "loss": 5.0 - s / total, "accuracy": s / total, "images_per_second": 64.0} for s in (step // 2, step)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    saved = portable.folder(folder) / portable.name_of(step)
    saved.mkdir(parents=True)
    (saved / portable.STATE).write_text(json.dumps({"step": step, "total_steps": total}), encoding="utf-8")
