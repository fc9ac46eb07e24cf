"""k8s/README.md promises only what there is: its commands are parsed, and its options, keys, folders and alerts exist."""

import argparse
import fnmatch
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from sample_requests import DIGEST, OVERLAYS, ROOT

from launcher.cluster import cli
from launcher.cluster.kustomization import FILE
from launcher.elastic import __main__ as elastic
from personmae import __main__ as program
from personmae import config
from personmae.keys.table import keys_of

README = (ROOT / "k8s/README.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OF_OTHERS = {"--from-literal", "--role", "--group", "--user", "--overwrite"}  # options of kubectl
OF_OTHERS |= {"--ignore-daemonsets", "--delete-emptydir-data"}


def commands_of(text: str) -> list[str]:
    """Lines of code blocks, continued ones joined, and the commands that stand between backticks in the text."""
    blocks = [block for language, block in _BLOCK.findall(text) if language != "text"]  # which is what comes out
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return lines + re.findall(r"`((?:personmae|python|kubectl|make|docker|pytest) [^`]+)`", _BLOCK.sub("", text))


COMMANDS = commands_of(README)
OURS = [line for line in COMMANDS if line.startswith(("personmae ", "python "))]


def parse(line: str) -> argparse.Namespace:
    """What the command's own parser makes of it; a line that it does not take ends in ``SystemExit``."""
    first, *words = shlex.split(line)
    if first == "personmae":
        return program.build_parser().parse_args(words)
    assert words[:2] == ["-m", "launcher.elastic"], f"no parser is known here for {line}"
    return elastic.build_parser().parse_args(words[2:])


def test_commands_are_found_in_blocks_and_in_the_text() -> None:
    text = "`make x` and `a b`\n```\npersmae a \\\n    b\n\nc d\n```\n| `personmae logs RUN` |\n"
    assert commands_of(text) == ["persmae a      b", "c d", "make x", "personmae logs RUN"]
    verbs = {line.split()[1] for line in OURS}
    assert verbs >= {"render", "submit", "status", "logs", "scale", "suspend", "resume", "delete", "shards"}
    assert {line.split()[0] for line in COMMANDS} == {"personmae", "make", "docker", "kubectl", "pytest"}


@pytest.mark.parametrize("line", OURS)
def test_every_command_of_ours_is_taken_by_its_parser(line: str) -> None:
    assert parse(line).run


def test_a_command_that_is_not_taken_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("personmae scale RUN", "personmae logs RUN --indx 0", "python -m launcher.elastic run --nods 2 -- x"):
        with pytest.raises(SystemExit):
            parse(line)
    assert capsys.readouterr().err.count("error: ") == 3


@pytest.mark.parametrize("line", [line for line in OURS if line.split()[1] in ("submit", "render")])
def test_what_is_submitted_and_rendered_works_with_real_values(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = {"sha256:DIGEST": DIGEST, "ACCOUNT": "123456789012", "REGISTRY": "registry.test", "BUCKET": "bucket"}
    real |= {"k8s/overlays/mine": str(tmp_path / "mine")}
    for word, value in real.items():
        line = line.replace(word, value)
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in shlex.split(line)[1:]]
    words += ["--no-bucket-check", "--dry-run", "client"] if words[0] == "submit" else []
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    assert "error" not in printed.err
    assert (tmp_path / "mine" / FILE).is_file() if words[0] == "render" else "nothing created" in printed.out


def test_other_programs_are_given_what_is_there() -> None:
    applied = re.findall(r"apply -k (\S+)", "\n".join(COMMANDS))
    assert [folder for folder in applied if folder != "DIR" and not (ROOT / folder / FILE).is_file()] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {line.split()[1] for line in COMMANDS if line.startswith("make ")} <= set(targets)
    assert all((ROOT / line.split()[1]).exists() for line in COMMANDS if line.startswith("pytest "))


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options_of(below)


def test_every_option_and_key_that_is_named_exists() -> None:
    known = {*options_of(program.build_parser()), *options_of(elastic.build_parser()), *OF_OTHERS}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - known == set()
    keys = {key.name for kind in config.PROGRAMS.values() for key in keys_of(kind)}
    named_keys = set(re.findall(r"`((?:data|train|optim|checkpoint|metrics)\.[a-z_]+)", README))
    assert len(named_keys) > 5
    assert named_keys - keys == set()


def test_every_component_overlay_and_alert_is_named_and_no_other() -> None:
    words = set(re.findall(r"`([\w*-]+)`", README))
    parts = {path.parent.name for path in ROOT.glob(f"k8s/components/*/{FILE}")}
    assert parts - words == set()
    assert [overlay for overlay in OVERLAYS if not any(fnmatch.fnmatchcase(overlay, word) for word in words)] == []
    rules = yaml.safe_load((ROOT / "k8s/alerts/rules.yaml").read_text())
    alerts = {rule["alert"].removeprefix("Personmae") for group in rules["groups"] for rule in group["rules"]}
    table = README.partition("| alert | what to do |\n|---|---|\n")[2].partition("\n\n")[0]
    assert {name for line in table.splitlines() for name in line.split("|")[1].strip().split(", ")} == alerts
