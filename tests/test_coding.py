"""Texts are UTF-8 whatever the locale: every reading and writing of one says so, and no name keeps a program from printing."""

import ast
import io
import sys
from pathlib import Path

import pytest

from personmae import errors

ROOT = Path(__file__).parent.parent
FILES = [path for top in ("personmae", "launcher", "benchmarks", "k8s") for path in sorted((ROOT / top).rglob("*.py"))]


def unsaid(tree: ast.AST) -> list[int]:
    """Lines of calls that would read or write a text in the locale's coding."""
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_text(node) and not _says(node)]


def _says(call: ast.Call) -> bool:
    return any(word.arg in ("encoding", None) for word in call.keywords)


def _is_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    words = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name in ("read_text", "write_text"):
        return True
    if name in ("run", "Popen", "check_output") and owner == "subprocess":
        return words.get("text") == "True" or words.get("universal_newlines") == "True"
    if name == "FileHandler":
        return True
    if name == "open" and owner in ("", "io") and call.args:
        return "b" not in (ast.unparse(call.args[1]) if len(call.args) > 1 else words.get("mode", ""))
    # ``path.open()`` or ``path.open("w")``; other things that open have other arguments
    mode = call.args[0] if name == "open" and call.args else None
    is_mode = isinstance(mode, ast.Constant) and str(mode.value) in {"r", "w", "a", "x", "r+", "w+", "a+"}
    return is_mode or (name == "open" and owner not in ("", "Image", "os", "tarfile", "lmdb") and not call.args and not words)


def test_the_walk_finds_what_does_not_say_its_coding():
    text = "p.read_text()\np.open('a', buffering=1)\nopen(p, mode='r')\nsubprocess.run(x, text=True)\n"
    assert unsaid(ast.parse(text)) == [1, 2, 3, 4]
    text = "p.open('rb')\nopen(p, 'wb')\ncache.open(3)\np.read_text(encoding='utf-8')\nsubprocess.run(x)\nImage.open(p)\n"
    assert unsaid(ast.parse(text)) == []


@pytest.mark.parametrize("top", ["personmae", "launcher", "benchmarks", "k8s"])
def test_every_text_is_read_and_written_in_utf8(top):
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] == top]
    assert files
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in unsaid(ast.parse(path.read_bytes()))]
    assert found == []


@pytest.mark.parametrize("coding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_the_terminal_cannot_show_is_printed_with_escapes(monkeypatch, coding):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=coding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def program() -> None:
        print("a\udcff/日本/b")
        raise errors.UserError("a\udcff/日本/b is not there")

    assert errors.run_program(program) == errors.EXIT_USER_ERROR
    for stream in streams.values():
        stream.flush()
        output = stream.buffer.getvalue().decode(coding)  # type: ignore[attr-defined]
        assert "a\\udcff/" in output
        assert ("/日本/b" if coding == "utf-8" else "/\\u65e5\\u672c/b") in output


def test_a_stream_that_cannot_be_told_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw
    assert errors.run_program(lambda: None) == errors.EXIT_COMPLETE


def test_a_name_that_the_locale_cannot_write_is_told_in_one_line(capsys):
    def program() -> None:
        "/data/größe".encode("ascii")

    assert errors.run_program(program) == errors.EXIT_USER_ERROR
    printed = capsys.readouterr().err
    assert (
        printed == "error: the locale's encoding, ascii, has no 'ö', which is in a name. Set PYTHONUTF8=1 and run this again\n"
    )
