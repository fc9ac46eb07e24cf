"""The run that several tests compare with."""

from pathlib import Path

import pytest
from fault_sets import proxy, remote  # noqa: F401 - fixtures of several files
from programs import ROOT, pretrain


@pytest.fixture(scope="session")
def native_run(shard_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps of the plain loop, uninterrupted."""
    run_dir = tmp_path_factory.mktemp("native") / "run"
    pretrain(shard_dir, run_dir, "engine.name=native", "checkpoint.every_steps=5")
    return run_dir


@pytest.fixture
def in_checkout(monkeypatch: pytest.MonkeyPatch, restore_signals: None) -> None:
    """For programs that run in this process: in the checkout, on the CPU, without a rank."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
