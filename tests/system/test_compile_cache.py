"""A library of the compiler's that a kill has cut short is removed and compiled again; what is whole, or in work, stays."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from personmae.system import compile_cache

LIBRARIES = [*Path(numpy.__file__).parent.rglob("*.so")]
LIBRARY = min(LIBRARIES, key=lambda path: path.stat().st_size)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as torch lays it out, and no other in reach."""
    for name in ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    (tmp_path / "inductor" / "locks").mkdir(parents=True)
    return tmp_path / "inductor"


def library(path: Path, size: int | None = None) -> Path:
    """A real library, whole or its first bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(LIBRARY.read_bytes()[:size])
    return path


def test_a_library_is_whole_with_its_last_byte_only(tmp_path):
    size = LIBRARY.stat().st_size
    assert compile_cache.is_whole(library(tmp_path / "whole.so"))
    for cut in (0, 1, 63, 64, 1000, 4096, size // 2, size - 64, size - 1):
        assert not compile_cache.is_whole(library(tmp_path / "cut.so", cut)), cut
    content = (tmp_path / "whole.so").read_bytes()
    for kept in (0, 16, 40, 54, 56):  # the rest is zero, as after a power failure
        (tmp_path / "cut.so").write_bytes(content[:kept] + bytes(size - kept))
        assert not compile_cache.is_whole(tmp_path / "cut.so"), kept


def test_the_libraries_of_numpy_and_of_torch_are_whole():
    import torch

    paths = [*LIBRARIES, *(Path(torch.__file__).parent / "lib").glob("*.so")]
    assert len(paths) > 20
    assert [path for path in paths if not compile_cache.is_whole(path)] == []


def test_what_is_damaged_is_removed_and_told_and_all_else_stays(cache, tmp_path, capsys):
    whole = library(cache / "aa" / "caaa.so")
    cut = [library(cache / "bb" / "cbbb.main.so", 1000), library(tmp_path / "TRITON_CACHE_DIR" / "x" / "launcher.so", 0)]
    empty, module, package = (
        cache / "cc" / "cccc.py",
        cache / "dd" / "cddd.py",
        tmp_path / "TORCH_EXTENSIONS_DIR" / "__init__.py",
    )
    for path in (empty, module, package):
        path.parent.mkdir()
        path.write_text("x = 1\n" if path == module else "")
    assert sorted(compile_cache.mend()) == sorted([*cut, empty])
    assert [path.exists() for path in (whole, module, package, *cut, empty)] == [True] * 3 + [False] * 3
    assert capsys.readouterr().out.count("was cut short. It is removed and compiled again") == 3
    assert compile_cache.mend() == []


def test_what_another_process_compiles_now_is_left_to_it(cache):
    cut = library(cache / "bb" / "cbbb.main.so", 1000)
    with (cache / "locks" / "cbbb.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert compile_cache.mend() == []
        assert cut.exists()
    assert compile_cache.mend() == [cut]


def test_where_nothing_was_compiled_there_is_nothing_to_mend(tmp_path, monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    assert compile_cache.mend() == []
    assert not (tmp_path / "none").exists()


STARTS = """
import os, shutil, sys
from pathlib import Path
import torch, torch._dynamo, torch._inductor.compile_fx
from personmae.system import compile_cache

def start(mends):
    "A start of a program: the exit code of a child that compiles a function."
    if not (child := os.fork()):
        code = 1
        try:
            if mends:
                compile_cache.mend()
            code = 0 if torch.compile(lambda x: (x * 2 + 1).relu().sum())(torch.ones(64)) == 192 else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
found = [start(False)]
(kernel,) = cache.rglob("*.main.so")
os.truncate(kernel, int(sys.argv[1]))
found += [start(False), start(True), compile_cache.is_whole(kernel), start(False)]
print(found)
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
@pytest.mark.parametrize("size", [0, 1000])
def test_a_start_after_a_kill_in_the_compiler_compiles_again(tmp_path, size):
    """With torch's own compiler; without the mend the second start ends by a traceback (1) or by SIGBUS (-7)."""
    places = {"TORCHINDUCTOR_CACHE_DIR": tmp_path / "inductor", "TRITON_CACHE_DIR": tmp_path / "triton"}
    env = os.environ | {name: str(path) for name, path in places.items()} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", STARTS, str(size)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, spoiled, mended, whole, again = eval(done.stdout.splitlines()[-1])
    assert (first, mended, whole, again) == (0, 0, True, 0)
    assert spoiled in (1, -7)
