"""Agents as the tests of this folder start them."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import warm

ROOT = Path(__file__).resolve().parents[2]


class Started:
    """``python -m launcher.elastic run`` in the background."""

    def __init__(self, log: Path, options: list[str], command: list[str]) -> None:
        self._log = log
        line = ["-m", "launcher.elastic", "run", *options, "--", *command]
        environ = os.environ | {"TMPDIR": str(log.parent)} | warm.FIXED
        with open(log, "wb") as file:
            self.process = warm.start(line, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT)

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, pattern: str, times: int = 1, seconds: float = 30) -> list[str]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(found := re.findall(pattern, self.output(), re.MULTILINE)) >= times:
                return found
            time.sleep(0.02)
        raise TimeoutError(f"{pattern}: {self.output()}")

    def code(self) -> int:
        return self.process.wait(timeout=40)


Start = Callable[..., Started]
