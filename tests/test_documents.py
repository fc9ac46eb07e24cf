"""The documents are true: their commands parse, the files they name exist, their Python runs, and their sentences are short."""

import argparse
import ast
import itertools
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import documents
import pytest

import launcher.program
from launcher.cluster import suite
from launcher.elastic import __main__ as elastic
from personmae import __main__, config
from personmae.checkpoint import portable
from personmae.commands import about
from personmae.errors import UserError
from personmae.keys.renamed import print_new_name

ROOT = Path(__file__).resolve().parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "configs/README.md", "benchmarks/README.md", "k8s/README.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
OTHER_CONFIG = {"pretrain": "pretrain_vit_base", "finetune": "finetune_market1501", "unsupervised": "usl_market1501"}
NO_FILES = {"results.md", "config.yaml", "X.py"}  # what programs leave in a run, and what stands for several
PLAIN_WORDS = {  # what was written before, and what is written now
    "the usual way": "baseline",
    "by hand": "measured once",
    "mend": "fix",
    "anew": "again",
    "milestone": "nothing outside the repository",
    "the design": "nothing outside the repository",
}
_OURS = re.compile(r"\bpersonmae (?!-)|-m launcher\.elastic|launcher/\w+\.py")
SHORT = re.compile(r"\.\.\.|\bX\b|[|\[]")  # a command that leaves something out, or stands for several


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def typed(page: Path) -> list[str]:
    """The command lines of a page's blocks; of a script only those that a parser of ours reads."""
    found = []
    for block in documents.blocks(documents.read(page)):
        lines = documents.command_lines(block)
        found += [line for line in lines if block.language == "" or _OURS.search(line)]
    return found


def said(page: Path) -> list[str]:
    """The commands within a page's sentences and tables."""
    spans = documents.spans(documents.read(page))
    return [span for span in spans if re.match(r"(personmae|make|deepspeed|torchrun|python) ", span)]


def cases(commands: set[tuple[str, str]]) -> list[Any]:
    """Pages and commands as parameters. Scripts of ``benchmarks/`` import much before they parse, so they are slow."""
    return [
        pytest.param(*case, marks=pytest.mark.slow if "python benchmarks/" in case[1] else (), id=f"{case[0]}: {case[1][:80]}")
        for case in sorted(commands)
    ]


COMMANDS = {(name_of(page), line) for page in PAGES for line in typed(page)}
SPANS = {(name_of(page), span) for page in PAGES for span in said(page)}


# --- commands ---


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


@pytest.mark.parametrize(("page", "line"), cases(COMMANDS))
def test_every_command_of_a_block_is_taken_by_its_parser(page, line, monkeypatch, capsys):
    check(line, monkeypatch, capsys)


@pytest.mark.parametrize(("page", "span"), cases(SPANS))
def test_every_command_in_a_sentence_is_taken_or_is_the_name_of_one(page, span, monkeypatch, capsys):
    words = span.split()
    if words[0] == "personmae" and SHORT.search(span):
        assert SHORT.search(words[1]) or is_a_verb(words[1:2])
    elif not SHORT.search(span) and not is_a_name(words):
        check(span, monkeypatch, capsys)


def is_a_name(words: list[str]) -> bool:
    """Whether a program or a verb is named, without what it would need to be run."""
    if words[0] in ("deepspeed", "torchrun"):
        return not any(word.startswith("launcher/") for word in words)
    return words == ["python", "-m", "launcher.elastic"] or (words[0] == "personmae" and is_a_verb(words[1:]))


def is_a_verb(words: list[str]) -> bool:
    try:
        return bool(about.find(__main__.build_parser(), words))
    except (UserError, SystemExit):
        return False


@pytest.mark.parametrize(
    "line",
    [
        "personmae pretrian CONFIG",
        "personmae pretrain CONFIG train.epoch=3",
        "personmae pretrain CONFIG checkpoint.store=s3://b/r",
        "personmae bench rank market",
        "personmae finetune CONFIG --dry-run 2",
        "personmae submit configs/suite_paper.yaml --local resluts=x",
        "deepspeed launcher/pretrain.py --config configs/none.yaml",
        "deepspeed --no_shh launcher/pretrain.py --config CONFIG",
        "python -m launcher.elastic run --nnode 2 -- launcher/pretrain.py --config CONFIG seeds=1",
        "make quikstart",
        "make test VENVS=x",
        pytest.param("python benchmarks/commands.py quickstart --like avx2", marks=pytest.mark.slow),
        "python benchmarks/cluster.py --rounds 2",
        "benchmarks/gpu.sh --wheel DIR",
        "kubectl apply -k k8s/overlays/none",
        "docker run IMAGE REGISTRY/personmae pretrian CONFIG",
        "frobnicate CONFIG",
    ],
)
def test_a_wrong_command_is_found(line, monkeypatch, capsys):
    with pytest.raises((pytest.fail.Exception, AssertionError, UserError)):
        check(line, monkeypatch, capsys)


def test_commands_are_read_as_they_are_typed():
    block = documents.Block("", "host-0$ a b \\\n    c   # why\n(the same line)\n\n# only a comment\nd 'e#f'\n")
    assert [line.split() for line in documents.command_lines(block)] == [["a", "b", "c"], ["d", "'e#f'"]]
    assert documents.command_lines(documents.Block("python", "a = 1\n")) == []


# --- files, links, Python ---

FILE = re.compile(r"[\w./-]+\.(?:py|md|sh|yaml)\b")
FILES = [path for path in ROOT.rglob("*") if path.is_file() and not {".git", ".venv", "runs"} & set(path.parts)]
FOLDERS = ("personmae/", "launcher/", "tests/", "docs/", "configs/", "k8s/", "benchmarks/")


def is_here(name: str) -> bool:
    """Whether a file of the repository has this name, or this end of its path."""
    return any(str(path).endswith(f"/{name}") for path in FILES)


def named_files(text: str) -> set[str]:
    """Files and folders of the repository that a page names in its code spans."""
    spans = documents.spans(text)
    found = {word for span in spans for word in FILE.findall(span)}
    files = {word for word in found if Path(word).name not in NO_FILES and not word.partition("/")[0].isupper()}
    folders = {span for span in spans if span.startswith(FOLDERS) and span.endswith("/")}
    return files | folders | {span for span in spans if re.fullmatch(r"benchmarks/results/\w+\.json", span)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_a_page_names_exists(page):
    names = named_files(documents.read(page))
    assert sorted(n for n in names if not (ROOT / n).exists() and not (page.parent / n).exists() and not is_here(n)) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_function_that_a_page_names_is_in_its_file(page):
    for file, names in re.findall(r"`([\w/]+\.py):\s([\w.,\s]+)`", documents.read(page)):
        nodes = [node for path in FILES if str(path).endswith(f"/{file}") for node in ast.walk(ast.parse(documents.read(path)))]
        defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert [name for name in re.split(r"[.,\s]+", names) if name not in defined] == [], file


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for link in documents.links(documents.read(page)):
        target, _, anchor = link.partition("#")
        if target.startswith("https://"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), link
        assert not anchor or anchor in documents.anchors(documents.read(file)), link


def test_every_script_and_record_of_the_benchmarks_is_listed():
    spans = set(documents.spans(documents.read(ROOT / "benchmarks/README.md")))
    folder = ROOT / "benchmarks"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*.py")} | {p.name for p in folder.glob("results/*.json")}
    assert there - spans == set()
    assert {span for span in spans if re.fullmatch(r"[\w/]+\.(py|json)", span)} - there == set()


def test_a_file_that_is_gone_is_found():
    assert named_files("`personmae/nothing.py` and `docs/` and `run.json`") == {"personmae/nothing.py", "docs/"}
    assert not is_here("personmae/nothing.py")
    assert is_here("model/vit.py")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, shard_dir: Path) -> Path:
    """A folder with small runs where the quickstart's would be."""
    from people import draw_few_people  # what it imports takes longer than the rest of this file

    there = tmp_path_factory.mktemp("there")
    runs, configs = there / "runs/quickstart", ROOT / "configs"
    people = draw_few_people(runs)
    small = ["train.precision=fp32", "checkpoint.every_steps=100"]
    pretrain = [f"data.shards={shard_dir}", f"run_dir={runs / 'pretrain'}", "train.global_batch_size=8", "train.total_steps=2"]
    finetune = [f"root={people / 'market1501'}", f"run_dir={runs / 'finetune_personmae'}", f"init={runs / 'pretrain'}"]
    finetune += ["batch.num_ids=4", "batch.num_instances=2", "train.epochs=1", "train.bn_group_size=8"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    assert __main__.main(["pretrain", str(configs / "quickstart.yaml"), *pretrain, *small]) == 0
    assert __main__.main(["finetune", str(configs / "quickstart_personmae.yaml"), *finetune, *small]) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return there


def python_of(page: str) -> str:
    (block,) = [block for block in documents.blocks(documents.read(ROOT / page)) if block.language == "python"]
    return block.text


def test_the_five_lines_of_the_readme_give_features_of_length_one(quickstart, monkeypatch):
    monkeypatch.chdir(quickstart)
    text, names = python_of("README.md"), {}
    exec(compile(text, "README.md", "exec"), names)
    assert names["features"].norm(dim=1).tolist() == pytest.approx([1] * 8, abs=1e-5)
    assert len([node for node in ast.parse(text).body if not isinstance(node, ast.ImportFrom)]) == 5


def test_the_python_of_the_tutorial_gives_features_of_an_encoder_and_the_encoder_itself(quickstart, monkeypatch):
    monkeypatch.chdir(quickstart)
    names: dict = {}
    with pytest.warns(UserWarning, match="is pre-trained only"):
        exec(compile(python_of("docs/tutorial.md"), "tutorial.md", "exec"), names)
    assert names["encoder"].config["size"] == (128, 64)
    assert names["features"].norm(dim=1).tolist() == pytest.approx([1] * len(names["features"]), abs=1e-5)
    weights, _ = portable.read_encoder("runs/quickstart/pretrain")
    assert all((names["backbone"].state_dict()[name] == tensor).all() for name, tensor in weights.items())


def test_the_vectors_of_the_readme_are_written_by_its_command(quickstart, monkeypatch, restore_signals):
    from personmae.weights import feature_file

    monkeypatch.chdir(quickstart)
    section = documents.read(ROOT / "README.md").partition("## I have images and want vectors\n")[2].partition("\n## ")[0]
    (block,) = documents.blocks(section)
    lines = documents.command_lines(block)
    assert [line.split()[:2] for line in lines] == [["personmae", "extract"]]
    for line in lines:
        assert __main__.main(shlex.split(line)[1:]) == 0
    found = feature_file.read(quickstart / "features.parquet")
    assert len(found.ids) == len(list((quickstart / "runs/quickstart/data/market1501/query").glob("*.jpg")))
    assert (found.features**2).sum(axis=1).tolist() == pytest.approx([1] * len(found.ids), abs=1e-4)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile_and_no_block_is_of_an_unknown_language(page):
    for block in documents.blocks(documents.read(page)):
        assert block.language in ("", "bash", "python", "text", "yaml", "mermaid")
        if block.language == "python":
            compile(block.text, name_of(page), "exec")


# --- prose ---


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_sentences_are_short_and_lines_fit(page):
    found = documents.measure(documents.read(page))
    assert found.median_words <= 18
    assert found.semicolons <= 2
    assert found.long_lines == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_words_are_plain(page):
    text = " ".join(documents.without_code(documents.read(page)).lower().split())
    assert [word for word in PLAIN_WORDS if re.search(rf"\b{word}\b", text)] == []


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_lines_of_configurations_fit(file):
    assert [line for line in documents.read(file).splitlines() if len(line) > documents.MOST_CHARACTERS] == []


def test_the_readme_is_a_screen_and_a_half():
    assert len(documents.read(ROOT / "README.md").splitlines()) <= 90


def test_measures_count_what_they_say():
    text = """# A heading; not prose

One two three. Four `five; six` seven; eight nine? See Eq. (5) too.

| a | b; c |
|---|---|

- an item of
  five words

```
code; code; code. Not a sentence.
```
"""
    assert documents.sentences(text) == [
        "One two three.",
        "Four code seven; eight nine?",
        "See Eq (5) too.",
        "an item of five words",
    ]
    found = documents.measure(text)
    assert found.median_words == 4.5
    assert found.semicolons == pytest.approx(1000 * 3 / 24)
    assert found.long_lines == []
    assert documents.long_lines(f"{'word ' * 30}\n| {'cell ' * 30}\n{'x' * 130}\n") == ["word " * 30]
    assert documents.anchors("## What may be deleted\n### `a.b`, twice") == {"what-may-be-deleted", "ab-twice"}
