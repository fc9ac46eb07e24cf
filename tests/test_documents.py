"""The documents are true: their commands parse, the files they name exist, and their Python runs."""

import ast
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import documents
import pytest
from documents import PAGES, ROOT, name_of
from typed_commands import check

from personmae import __main__
from personmae.checkpoint import portable
from personmae.commands import about
from personmae.errors import UserError

NO_FILES = {"results.md", "config.yaml", "X.py"}  # what programs leave in a run, and what stands for several
_OURS = re.compile(r"\bpersonmae (?!-)|-m launcher\.elastic|launcher/\w+\.py")
SHORT = re.compile(r"\.\.\.|\bX\b|[|\[]")  # a command that leaves something out, or stands for several


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
