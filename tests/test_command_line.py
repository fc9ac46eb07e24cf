"""The command line tells what it takes: help, examples, keys, completion, and what was meant where something is mistyped."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import launcher.program
from launcher.cluster import cli
from launcher.cluster.suite import Suite
from launcher.elastic import __main__ as elastic
from personmae import __main__, config
from personmae.commands import about
from personmae.commands.arguments import place
from personmae.commands.examples import EXAMPLES, MAIN_KEYS, closing
from personmae.errors import EXIT_COMPLETE, EXIT_USER_ERROR, UserError
from personmae.keys.mistakes import dotted_keys
from personmae.keys.renamed import print_new_name
from personmae.keys.table import keys_of, sections_of

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``personmae ARGV``."""
    try:
        code = __main__.main(list(argv))
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code, out, err = call(capsys, *argv)
    assert (code, out) == (EXIT_USER_ERROR, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of verbs that have no verbs of their own."""
    below = [each for action in about.verbs_of(parser) for each in action.choices.values()]
    return [leaf for each in below for leaf in leaves(each)] if below else [parser]


LEAVES = {leaf.prog: leaf for leaf in leaves(__main__.build_parser())}


# --- help ---


def test_without_a_word_there_is_the_help_and_code_0(capsys):
    code, out, err = call(capsys)
    assert (code, err) == (EXIT_COMPLETE, "")
    assert "usage: personmae" in out
    assert {*config.PROGRAMS, "synth", "shards", "evaluate", "report", "doctor", "keys", "submit"} <= set(out.split())
    assert call(capsys, "help") == (code, out, err)
    assert call(capsys, "--help") == (code, out, err)


def test_help_of_a_verb_is_its_own_help(capsys):
    code, out, _ = call(capsys, "help", "shards", "write")
    assert code == EXIT_COMPLETE
    assert (code, out) == call(capsys, "shards", "write", "--help")[:2]
    assert "unknown verb 'wriet'. Did you mean 'write'?" in refusal(capsys, "help", "shards", "wriet")
    assert "has no verbs of its own. Got 'x'" in refusal(capsys, "help", "finetune", "x")


def test_the_version_is_printed(capsys):
    code, out, _ = call(capsys, "--version")
    assert code == EXIT_COMPLETE
    assert re.fullmatch(r"personmae (\d+\.\d+\.\d+|of a checkout that is not installed)\n", out)


@pytest.mark.parametrize("prog", LEAVES)
def test_the_help_of_every_verb_says_what_it_does_and_has_an_example_that_parses(prog):
    verb = prog.removeprefix("personmae ")
    text = LEAVES[prog].format_help()
    assert "example" in text
    assert LEAVES[prog].description
    words = shlex.split(EXAMPLES[verb].removeprefix('eval "$(').removesuffix(')"'))
    assert __main__.build_parser().parse_args(words[1:]).run
    assert " ".join(words[1:]).startswith(verb)


@pytest.mark.parametrize("program", config.PROGRAMS)
def test_the_help_of_a_program_has_its_main_keys_with_their_defaults(program):
    text = LEAVES[f"personmae {program}"].format_help()
    rows = {key.name: key for key in keys_of(config.PROGRAMS[program])}
    assert set(MAIN_KEYS[program]) <= set(rows)
    for name in MAIN_KEYS[program]:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert rows[name].default in line
    of_launcher = closing(f"launcher/{program}.py")
    assert of_launcher
    assert f"deepspeed launcher/{program}.py --config" in of_launcher


def test_examples_name_files_that_are_here():
    named_files = {word for text in EXAMPLES.values() for word in text.split() if word.startswith(("configs/", "launcher/"))}
    assert named_files
    assert [name for name in named_files if not (ROOT / name).is_file()] == []


# --- old names ---


@pytest.fixture
def _not_printed_before() -> None:
    print_new_name.cache_clear()


@pytest.mark.usefixtures("_not_printed_before")
def test_an_old_verb_is_the_new_one_prints_its_name_and_is_in_no_help(capsys):
    code, out, err = call(capsys, "bench", "rank", "--help")
    assert (code, err) == (EXIT_COMPLETE, "note: personmae bench rank is called personmae bench retrieval now\n")
    assert out == LEAVES["personmae bench retrieval"].format_help()
    assert call(capsys, "help", "bench", "rank")[:2] == (EXIT_COMPLETE, out)
    assert "rank" not in re.split(r"\W+", call(capsys, "bench", "--help")[1])
    assert __main__.build_parser().parse_args(["bench", "rank", "market"]).action == "retrieval"


@pytest.mark.usefixtures("_not_printed_before")
def test_an_old_option_sets_the_new_one_prints_its_name_and_is_in_no_help(capsys):
    parse = __main__.build_parser().parse_args
    assert parse(["bench", "step", "--cutters", "triton"]) == parse(["bench", "step", "--crop-backends", "triton"])
    assert capsys.readouterr().err == "note: --cutters is called --crop-backends now\n"
    assert "--cutters" not in LEAVES["personmae bench step"].format_help()
    agent = elastic.build_parser().parse_args(["run", "--wait-data-seconds", "7", "--", "x"])
    assert agent.data_wait_seconds == 7
    assert elastic.build_parser().parse_args(["run", "--", "x"]).data_wait_seconds == 1800
    assert capsys.readouterr().err == "note: --wait-data-seconds is called --data-wait-seconds now\n"


@pytest.mark.parametrize(
    "typed",
    [
        *("synth s3://b/x", "import a.pth s3://b/x", "export RUN s3://b/x", "extract SRC s3://b/x.npy --model RUN"),
        *("gallery build SRC s3://b/x", "gallery query s3://b/x a.jpg", "serve s3://b/x", "report s3://b/x"),
        *("visualise RUN --out s3://b/x", "evaluate RUN folder ROOT --out s3://b/x", "bench counts --out s3://b/x"),
    ],
)
def test_what_must_be_on_a_disk_is_not_taken_for_a_folder_named_s3(capsys, typed):
    assert "must be on a disk of this machine. s3://b/x" in refusal(capsys, *typed.split())


def test_an_option_of_synth_that_is_out_of_range_is_called_by_its_name(capsys):
    for option, value in (("--pool-images", "-3"), ("--people", "0"), ("--processes", "0"), ("--seed", "-1")):
        assert refusal(capsys, "synth", "OUT", option, value).startswith(f"argument {option}: must be a whole number")


# --- what was meant ---


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("pretrian", "pretrain"), ("fine-tune", "finetune"), ("sumbit", "submit"), ("docter", "doctor"), ("key", "keys")],
)
def test_an_unknown_verb_names_the_nearest(capsys, typed, meant):
    assert refusal(capsys, typed, "x").startswith(f"unknown verb '{typed}'. Did you mean '{meant}'?")


def test_unknown_verbs_below_and_words_like_none_are_told(capsys):
    assert refusal(capsys, "bench", "stpe").startswith("unknown verb 'stpe'. Did you mean 'step'? See 'personmae bench --help'")
    assert "unknown verb 'xyzzy'. There are synth, shards," in refusal(capsys, "xyzzy")
    with pytest.raises(SystemExit, match="78"):
        cli.main(["stauts", "x"])
    assert "Did you mean 'status'?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="78"):
        elastic.main(["rnu"])
    assert "Did you mean 'run'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["pretrain", "c.yaml", "--dry-rnu", "2"], "--dry-run"),
        (["submit", "c.yaml", "--node=2"], "--nodes"),
        (["submit", "c.yaml", "--namspace", "x"], "--namespace"),
        (["shards", "write", "a", "b", "--max-szie", "3"], "--max-side"),
    ],
)
def test_an_unknown_option_names_the_nearest(capsys, argv, meant):
    if argv[-1] == "--node=2":  # an unambiguous beginning is the option itself
        assert "c.yaml does not exist" in refusal(capsys, *argv)
        return
    assert re.match(rf"unknown option '{argv[-2]}'. Did you mean '{meant}'\? See", refusal(capsys, *argv))


@pytest.mark.parametrize(
    ("program", "typed", "meant"),
    [
        ("pretrain", "batch_size", "train.global_batch_size"),
        ("pretrain", "train.batch_size", "train.global_batch_size"),
        ("pretrain", "lr", "optim.lr"),
        ("pretrain", "learning_rate", "optim.lr"),
        ("pretrain", "epochs", "train.epochs"),
        ("pretrain", "steps", "train.total_steps"),
        ("pretrain", "train.steps", "train.total_steps"),
        ("pretrain", "img_size", "model.img_size"),
        ("pretrain", "image_size", "model.img_size"),
        ("pretrain", "data.img_size", "model.img_size"),
        ("pretrain", "precision", "train.precision"),
        ("pretrain", "shards", "data.shards"),
        ("pretrain", "cache_dir", "data.cache_dir"),
        ("pretrain", "zero_stage", "engine.deepspeed.zero_stage"),
        ("pretrain", "mask_ratio", "mask.ratio"),
        ("pretrain", "output_dir", "run_dir"),
        ("pretrain", "num_workers", "data.num_threads"),
        ("pretrain", "warmup", "optim.warmup_fraction"),
        ("pretrain", "rundir", "run_dir"),
        ("pretrain", "optim.weight_decy", "optim.weight_decay"),
        ("finetune", "batch_size", "batch.num_ids"),
        ("finetune", "train.batch_size", "batch.num_ids"),
        ("finetune", "lr", "optim.lr"),
        ("finetune", "num_ids", "batch.num_ids"),
        ("finetune", "pretrained", "init"),
        ("finetune", "dataset", "benchmark"),
        ("finetune", "data_dir", "root"),
        ("unsupervised", "batch_size", "batch.num_ids"),
        ("unsupervised", "eps", "cluster.eps"),
        ("unsupervised", "steps", "train.iters_per_epoch"),
        ("unsupervised", "epochs", "train.epochs"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(program, typed, meant):
    file = {"pretrain": "quickstart", "finetune": "quickstart_random", "unsupervised": "quickstart_usl"}[program]
    with pytest.raises(UserError) as caught:
        config.load(config.PROGRAMS[program], CONFIGS / f"{file}.yaml", [f"{typed}=12"])
    assert str(caught.value) == f"unknown key '{typed}' in the command line. The nearest known key is '{meant}'"


def test_an_unknown_key_of_a_suites_stage_names_the_one_that_was_meant(tmp_path):
    (tmp_path / "s.yaml").write_text("name: s\nresults: o\nstages:\n- {name: a, config: b.yaml, ovrlay: x}\n")
    with pytest.raises(UserError, match=r"unknown key 'stages\.0\.ovrlay' in .*. The nearest known key is 'stages\.overlay'"):
        config.load(Suite, tmp_path / "s.yaml")


# --- a file for another program ---

FILES = {
    "pretrain": CONFIGS / "pretrain_vit_small.yaml",
    "finetune": CONFIGS / "finetune_msmt17.yaml",  # its own keys are those that both have; its base's tell
    "unsupervised": CONFIGS / "uda_msmt17_to_market1501.yaml",
    "suite": CONFIGS / "suite_paper.yaml",
}
CALLED = {
    "pretrain": "a pre-training",
    "finetune": "a fine-tuning",
    "unsupervised": "an unsupervised-training",
    "suite": "a suite",
}


@pytest.mark.parametrize("of", FILES)
@pytest.mark.parametrize("given", config.PROGRAMS)
def test_a_file_for_another_program_says_so_with_the_command(capsys, monkeypatch, given, of):
    path = str(FILES[of])
    if given == of:
        assert call(capsys, given, path, "--print-config")[0] == EXIT_COMPLETE
        return
    verb = "submit --local" if of == "suite" else of
    expected = f"{path} is {CALLED[of]} file: personmae {verb} {path}"
    assert refusal(capsys, given, path) == expected
    assert refusal(capsys, given, path, "seed=3", "--print-config") == expected
    monkeypatch.setattr(sys, "argv", ["launcher", "--config", path])
    assert launcher.program.main(given) == EXIT_USER_ERROR
    of_launcher = expected if of == "suite" else expected.replace(f"personmae {of}", f"launcher/{of}.py --config")
    assert capsys.readouterr().err == f"error: {of_launcher}\n"


@pytest.mark.parametrize("of", ["pretrain", "finetune", "unsupervised"])
def test_a_programs_file_given_as_a_suite_says_so(of):
    with pytest.raises(UserError, match=f"is {CALLED[of]} file: personmae {of} "):
        config.load(Suite, FILES[of])


def test_a_mistake_in_a_programs_own_file_is_told_as_that(tmp_path):
    (tmp_path / "a.yaml").write_text("run_dir: x\ndata: {shards: y}\nroot: z\n")
    with pytest.raises(UserError, match="unknown key 'root'"):
        config.load(config.Pretrain, tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("run_dir: x\n")
    with pytest.raises(UserError, match="'data' is required"):
        config.load(config.Pretrain, tmp_path / "a.yaml")


# --- keys ---


@pytest.mark.parametrize("kind", [*config.PROGRAMS.values(), Suite], ids=lambda kind: kind.__name__)
def test_every_key_and_every_section_has_a_description(kind):
    sections = sections_of(kind)
    assert [section.name for section in sections if not section.description] == []
    assert [key.name for key in keys_of(kind) if not key.description.strip()] == []
    assert {section.name for section in sections if section.name} | {key.name for key in keys_of(kind)} >= {
        key for key in dotted_keys(kind) if not key.startswith("stages.")
    }


def test_a_key_without_a_description_is_found():
    class Inner(config.Section):
        key: int = 1

    class Outer(config.Section):
        """A section."""

        inner: Inner = Inner()

    outer, inner = sections_of(Outer)
    assert (outer.name, outer.description, outer.keys) == ("", "A section.", [])
    assert (inner.name, inner.description, [key.description for key in inner.keys]) == ("inner", "", [""])


def test_the_page_of_keys_is_what_the_command_prints_now(capsys):
    code, page, err = call(capsys, "keys", "--markdown")
    assert (code, err) == (EXIT_COMPLETE, "")
    assert (ROOT / "docs/keys.md").read_text() == page, "write it again: personmae keys --markdown > docs/keys.md"
    assert max(map(len, page.splitlines())) <= 100
    items = re.findall(r"^- `([a-z0-9_.]+)` \(", page, re.MULTILINE)
    for kind in config.PROGRAMS.values():
        assert {key.name for key in keys_of(kind)} <= set(items)
    assert items.count("checkpoint.every_steps") == 1  # of all programs, so once
    assert items.count("optim.lr") == 3  # each program's own
    assert "takes no words. Got 'mask'" in refusal(capsys, "keys", "mask", "--markdown")


def test_descriptions_are_short_plain_sentences():
    texts = [key.description for kind in (*config.PROGRAMS.values(), Suite) for key in keys_of(kind)]
    texts += [section.description for kind in (*config.PROGRAMS.values(), Suite) for section in sections_of(kind)]
    assert [text for text in texts if ";" in text or max(len(part.split()) for part in text.split(". ")) > 25] == []


def test_keys_lists_every_key_with_type_default_and_meaning(capsys):
    code, out, _ = call(capsys, "keys", "pretrain")
    assert code == EXIT_COMPLETE
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert set(rows) == {key.name for key in keys_of(config.Pretrain)}
    assert re.search(
        r"model\.img_size +\[int > 0, int > 0\] +\[256, 128\] +\(height, width\) in pixels", rows["model.img_size"]
    )
    assert re.search(r"data\.shards +path +required ", rows["data.shards"])
    assert re.search(r"optim\.lr +number > 0 or null +null ", rows["optim.lr"])
    assert re.search(r"mask\.kind +block\|random\|person +block ", rows["mask.kind"])
    assert re.search(r"seed +int >= 0, < 2\^63 +0 ", rows["seed"])


def test_keys_finds_words_in_names_and_descriptions(capsys):
    code, out, _ = call(capsys, "keys", "finetune", "ERASE")
    assert code == EXIT_COMPLETE
    assert [line.split()[0] for line in out.splitlines()] == ["finetune:", "augment.erase_prob"]
    _, out, _ = call(capsys, "keys", "centroid")  # of a description, in one program
    assert out.startswith("unsupervised:\n")
    assert "no key has 'zzz' in its name or description. The nearest is '" in refusal(capsys, "keys", "zzz")


# --- completion ---


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_verbs_options_and_choices(capsys, shell):
    code, out, _ = call(capsys, "completion", shell)
    assert code == EXIT_COMPLETE
    for word in ("pretrain", "--print-config", "--dry-run", "k_reciprocal", "submit", "--overlay"):
        assert word in out
    if checker := shutil.which(shell):
        assert subprocess.run([checker, "-n"], input=out, text=True, capture_output=True, check=False).stderr == ""


def test_bash_completes_a_verb():
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    script = about.completion(__main__.build_parser(), "bash")
    ask = 'COMP_WORDS=(personmae pret); COMP_CWORD=1; _shtab_personmae; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash"], input=f"{script}\n{ask}\n", text=True, capture_output=True, check=False)
    assert done.stdout.split() == ["pretrain"]


# --- paths ---


def test_paths_of_the_command_line_have_homes_and_variables_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CROPS", "x")
    parse = __main__.build_parser().parse_args
    args = parse(["shards", "write", "~/$CROPS", "s3://$CROPS/a #1", "--list", "~/l"])
    assert [str(args.source), args.destination, args.list] == [f"{tmp_path}/x", "s3://x/a #1", tmp_path / "l"]
    args = parse(["evaluate", "~/run", "market1501", "~", "--out=~/o"])
    assert [args.checkpoint, args.root, args.out] == [f"{tmp_path}/run", str(tmp_path), tmp_path / "o"]
    assert parse(["report", "~"]).run_dir == tmp_path
    assert parse(["submit", "~/c.yaml"]).config == tmp_path / "c.yaml"
    assert elastic.build_parser().parse_args(["run", "--log-dir", "~/l", "--", "x"]).log_dir == tmp_path / "l"


def test_a_name_that_is_there_is_taken_as_it_stands_and_a_variable_that_is_not_set_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_SUCH", raising=False)
    (tmp_path / "~").mkdir()
    (tmp_path / "a$NO_SUCH").mkdir()
    assert place("~") == "~"
    assert place("a$NO_SUCH") == "a$NO_SUCH"
    assert "must not be empty" in refusal(capsys, "report", "")
    assert "must not be empty" in refusal(capsys, "shards", "write", "", "x")
    assert "the environment's variable NO_SUCH is not set" in refusal(capsys, "report", "$NO_SUCH/x")


def test_every_argument_that_is_a_path_is_expanded():
    """By its name: a new one must be a ``Path`` or a ``place`` too."""
    words = {"config", "root", "source", "destination", "shards", "remote", "checkpoint", "run_dir", "out", "list", "write"}
    words |= {"cache_dir", "data", "log_dir", "dir", "file"}
    found = {(leaf.prog, a.dest): a.type for leaf in LEAVES.values() for a in leaf._actions if a.dest in words}
    found = {key: kind for key, kind in found.items() if key != ("personmae help", "words")}
    assert len(found) > 15
    assert [key for key, kind in found.items() if kind not in (Path, place)] == []


def test_nothing_heavy_is_needed_for_the_help():
    code = "import sys; from personmae.__main__ import main; main([]); main(['keys', 'eps']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "shtab", "streaming"} & set(done)
