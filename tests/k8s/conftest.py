"""The real kustomize where there is one, and the recorded kubectl."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from real import cluster, real_cluster  # noqa: F401 - fixtures of several files
from recorder import Recorder
from sample_requests import by_name

from launcher.cluster import commands


@pytest.fixture(scope="session")
def kustomize() -> Callable[[Path], dict[tuple[str, str], dict[str, Any]]]:
    """The real kustomize on a directory: objects by kind and name."""
    command = _command()

    def build(directory: Path) -> dict[tuple[str, str], dict[str, Any]]:
        done = subprocess.run([*command, str(directory)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        return by_name([item for item in yaml.safe_load_all(done.stdout) if item])

    return build


def _command() -> list[str]:
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if not shutil.which("kubectl"):
        pytest.skip("needs kustomize 5 or kubectl 1.27 on PATH")
    told = subprocess.run(["kubectl", "version", "--client", "-o", "json"], capture_output=True, text=True, check=False)
    if not json.loads(told.stdout or "{}").get("kustomizeVersion", "").startswith("v5"):
        pytest.skip("kubectl is too old: its kustomize knows no components")
    return ["kubectl", "kustomize"]


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    (tmp_path / "bin").mkdir()
    shutil.copy(Path(__file__).parent / "kubectl.py", tmp_path / "bin" / "kubectl")
    (tmp_path / "bin" / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORDED_KUBECTL", str(tmp_path))
    monkeypatch.setattr(commands, "WATCH_SECONDS", 0)
    return Recorder(tmp_path)
