"""A command of a document, parsed by the very parser that it is for. Nothing is done then."""

import argparse
import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import documents
import pytest
from documents import ROOT

import launcher.program
from launcher.cluster import suite
from launcher.elastic import __main__ as elastic
from personmae import __main__, config
from personmae.keys.renamed import print_new_name

OTHER_CONFIG = {"pretrain": "pretrain_vit_base", "finetune": "finetune_market1501", "unsupervised": "usl_market1501"}


class Checked(Exception):  # noqa: N818 - a way to end
    """A program's own parser has taken its command line; nothing is done then."""


def check(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Have a command line parsed by the parser that it is for. Fails where that refuses it, or where a name is an old one."""
    print_new_name.cache_clear()
    monkeypatch.chdir(ROOT)
    try:
        check_line(line, monkeypatch)
    except SystemExit:
        pytest.fail(f"{line!r} is refused: {capsys.readouterr().err}")
    assert "is called" not in capsys.readouterr().err


def check_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if inner := re.search(r"--wrap '([^']*)'|\"\$\(([^)]*)\)\"", line):
        line = inner[1] or inner[2]
    variables = re.sub(r"\$\{[^}]*\}|\$\w+", "1", line)
    words = [word for word in shlex.split(variables) if word not in ("...", "&")]
    check_words(list(itertools.takewhile(lambda word: word not in (">", "|"), words)), monkeypatch)


def check_words(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``check_line``; before the program may stand what starts it, such as srun or docker."""
    start = next((i for i, word in enumerate(words) if word in _CHECKS), None)
    assert start is not None, f"no test knows how to check {words}"
    _CHECKS[words[start]](words[start + 1 :], monkeypatch)


def check_verb(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[:1] == ["--"]:  # another program in the image
        check_words(words[1:], monkeypatch)
        return
    args = __main__.build_parser().parse_args(words)
    if hasattr(args, "overrides"):
        check_settings(args.verb, str(args.config), [*args.overrides, *getattr(args, "set", [])])
    elif config_path := getattr(args, "config", None):
        assert str(config_path).isupper() or (ROOT / config_path).is_file()


def check_settings(verb: str, path: str, overrides: Sequence[str]) -> None:
    """The configuration of a command with its overrides; for a name such as CONFIG, one of the same program."""
    file = ROOT / path
    if path.isupper():
        file = ROOT / "configs" / f"{OTHER_CONFIG.get(verb, 'pretrain_vit_base')}.yaml"
    if suite.is_suite(file):
        assert suite.load(file, overrides)
        return
    assert config.load(config.PROGRAMS[verb if verb in config.PROGRAMS else config.program_of(file)], file, overrides)


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[:2] == ["-m", "launcher.elastic"]:
        args = elastic.build_parser().parse_args(words[2:])
        if script := [word for word in getattr(args, "command", []) if word != "--"]:
            check_launched(script, monkeypatch)
    elif words[:2] == ["-m", "pytest"]:
        assert [word for word in words if word.startswith("tests/") and not (ROOT / word).exists()] == []
    else:
        check_benchmark(words[0], words[1:], monkeypatch)


def check_benchmark(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a script of ``benchmarks/`` up to where its command line is parsed."""
    assert (ROOT / script).is_file()
    if "parse_args" not in documents.read(ROOT / script):
        assert words == [], f"{script} takes no arguments"
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *_: object) -> None:
        parse(parser, words)
        raise Checked

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    with pytest.raises(Checked):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def check_launched(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``launcher/X.py`` and its arguments, by its own parser; before it may stand the launcher's."""
    at = next(i for i, word in enumerate(words) if word.startswith("launcher/"))
    assert (ROOT / words[at]).is_file()

    def run_config(name: str, path: str, args: argparse.Namespace) -> None:
        check_settings(name, path, args.overrides)

    monkeypatch.setattr(launcher.program, "run_config", run_config)
    monkeypatch.setattr(sys, "argv", words[at:])
    if code := launcher.program.main(Path(words[at]).stem):
        raise SystemExit(code)


def check_deepspeed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher import runner

    check_launched(words, monkeypatch)
    assert runner.parse_args(words).user_script.startswith("launcher/")


def check_torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import run

    check_launched(words, monkeypatch)
    assert run.parse_args(words).training_script.startswith("launcher/")


def check_make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = documents.read(ROOT / "Makefile")
    for word in words:
        name, equals, _ = word.partition("=")
        assert re.search(rf"(?m)^{name} \?=" if equals else rf"(?m)^{name}:.*##", makefile), f"the Makefile has no {word}"


def check_gpu_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = documents.read(ROOT / "benchmarks/gpu.sh")
    assert [word for word in words if word.startswith("--") and f"    {word})" not in script] == []


def check_docker(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "run":  # else it is about the image as a whole
        check_words(words[1:], monkeypatch)


def check_kubectl(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [folder for option, folder in itertools.pairwise(words) if option == "-k" and not (ROOT / folder).is_dir()] == []


def check_nothing(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of the shell's own."""


_CHECKS = {
    "personmae": check_verb,
    "REGISTRY/personmae": check_verb,
    "python": check_python,
    ".venv/bin/python": check_python,
    "deepspeed": check_deepspeed,
    "torchrun": check_torchrun,
    "make": check_make,
    "benchmarks/gpu.sh": check_gpu_script,
    "docker": check_docker,
    "kubectl": check_kubectl,
    "export": check_nothing,
}
