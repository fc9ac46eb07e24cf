"""What is compiled for a GPU can be compiled, though there is none: see ``fake_gpu.py``."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with the CUDA builds of torch alone")
def test_drawing_cutting_teacher_and_student_compile_for_a_gpu_that_is_not_here(request, tmp_path: Path) -> None:
    command = [sys.executable, str(request.path.with_name("fake_gpu.py")), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280)
    if done.stderr.startswith("moved: "):
        pytest.skip(f"this torch keeps its compiler elsewhere: {done.stderr}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "and the student: " in done.stdout
