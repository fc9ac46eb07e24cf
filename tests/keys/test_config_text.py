"""What stands in a file or behind ``a.b=`` is what a key gets: texts as they stand, homes and variables filled in."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml

from launcher.cluster import kustomization, render
from launcher.cluster.suite import Suite, is_suite
from personmae import config
from personmae.commands.arguments import place
from personmae.errors import UserError
from personmae.keys.values import Place
from personmae.keys.yaml_text import Plain, read_tree
from personmae.system import locations

MINIMAL = "run_dir: out\ndata:\n  shards: in\n"
SUITE = "name: s\nresults: out\nstages:\n- {name: a, config: a.yaml}\n"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    return file


def load(path: Path, *overrides: str) -> config.Pretrain:
    return config.load(config.Pretrain, path, overrides)


def refused(path: Path, *overrides: str, kind: type[config.Section] = config.Pretrain) -> str:
    with pytest.raises(UserError) as caught:
        config.load(kind, path, overrides)
    assert "\n" not in " ".join(str(caught.value).split())
    return str(caught.value)


# --- a key that stands twice ---


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("optim:\n  lr: 1.0\nseed: 1\noptim:\n  min_lr: 0.1\n", "optim", (4, 7)),
        ("train:\n  epochs: 3\n  compile: false\n  epochs: 4\n", "epochs", (5, 7)),
        ("engine:\n  deepspeed:\n    extra:\n      a: {b: 1, c: 2, b: 3}\n", "b", (7, 7)),
        ("'seed': 1\nseed: 2\n", "seed", (4, 5)),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(path, text, key, lines):
    path.write_text(MINIMAL + text)
    assert refused(path) == f"{path}: '{key}' is given twice, in line {lines[0]} and line {lines[1]}. Keep one of them"


def test_a_key_given_twice_in_a_base_names_the_base(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\nseed: 2\n" + MINIMAL)
    (tmp_path / "run.yaml").write_text("_base_: base.yaml\nseed: 3\n")
    assert refused(tmp_path / "run.yaml").startswith(f"{tmp_path / 'base.yaml'}: 'seed' is given twice, in line 1 and line 2")


def test_a_key_given_twice_is_refused_in_suites_overrides_manifests_and_recorded_runs(tmp_path, path):
    (tmp_path / "suite.yaml").write_text(SUITE + "places: {a: x, b: y, a: z}\n")
    assert "'a' is given twice" in refused(tmp_path / "suite.yaml", kind=Suite)
    assert "'a' is given twice" in refused(path, "engine.deepspeed.extra={a: 1, a: 2}")
    (tmp_path / "kustomization.yaml").write_text("namespace: a\nresources: []\nnamespace: b\n")
    with pytest.raises(UserError, match="'namespace' is given twice, in line 1 and line 3"):
        kustomization.read(tmp_path)
    path.write_text(MINIMAL + "seed: 1\nseed: 2\n")
    with pytest.raises(UserError, match="'seed' is given twice"):
        config.program_of(path)


def test_keys_that_an_anchor_brings_in_may_be_set_again_and_stay_apart(path):
    path.write_text(
        f"{MINIMAL}engine:\n  deepspeed:\n    extra:\n      a: &a {{x: 1, y: 2}}\n      b: {{<<: *a, y: 3}}\n      c: *a\n"
    )
    settings = load(path, "engine.deepspeed.extra.c.x=9")
    assert settings.engine.deepspeed.extra == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 9, "y": 2}}


def test_a_section_that_holds_itself_is_refused(path):
    path.write_text(MINIMAL + "engine:\n  deepspeed:\n    extra: &x {a: *x}\n")
    assert "must not contain itself" in refused(path)


# --- texts ---


TEXTS = [
    "/data/set #2",
    "20240101",
    "1_000",
    "@x",
    "2024-01-01",
    "12:30",
    "1e-3",
    "010",
    "yes",
    "a: b",
    "[x",
    "{x",
    "'q'",
    "- x",
]


@pytest.mark.parametrize("text", [*TEXTS, "null", " spaced ", "*a", "&a", "!x", "%x", "`x", "a\\b"])
def test_a_text_key_takes_what_stands_on_the_command_line(path, tmp_path, text):
    settings = load(path, f"run_dir={text}", f"data.shards={text}", "optim.lr=1e-3")
    assert (settings.run_dir, settings.data.shards, settings.optim.lr) == (text, text, 1e-3)
    (tmp_path / "again.yaml").write_text(config.dump_yaml(settings))
    assert load(tmp_path / "again.yaml") == settings


@pytest.mark.parametrize("text", ["20240101", "1_000", "2024-01-01", "12:30", "1e-3", "010", "0x10", "yes", "1.50", ".inf"])
def test_a_text_key_takes_a_number_or_date_of_a_file_as_its_text(path, text):
    path.write_text(MINIMAL.replace("out", text) + f"checkpoint:\n  upload_to: {text}://b\n")
    assert load(path).run_dir == text
    assert load(path).checkpoint.upload_to == f"{text}://b"
    suite = path.with_name("suite.yaml")
    suite.write_text(SUITE.replace("name: s", f"name: {text}") + f"places: {{a: {text}}}\n")
    read = config.load(Suite, suite)
    assert (read.name, read.places) == (text, {"a": text})
    assert config.load(Suite, suite, [f"places.b={text}"]).places["b"] == text


def test_null_is_nothing_for_a_key_that_may_have_nothing_and_quotes_make_it_a_text(path):
    path.write_text(MINIMAL + "checkpoint:\n  upload_to: s3://b/x\n")
    assert load(path, "checkpoint.upload_to=null").checkpoint.upload_to is None
    assert load(path, "checkpoint.upload_to=s3://b/a #1").checkpoint.upload_to == "s3://b/a #1"
    for empty in ("null", "Null", ""):
        path.write_text(MINIMAL + f"checkpoint:\n  upload_to: {empty}\n")
        assert load(path).checkpoint.upload_to is None
        path.write_text(MINIMAL.replace("out", empty))
        assert refused(path).startswith(f"'run_dir' in {path}: ")
    path.write_text(MINIMAL + "checkpoint: {upload_to: ~}\n")
    assert load(path).checkpoint.upload_to is None
    path.write_text(MINIMAL.replace("out", "'null'"))
    assert load(path).run_dir == "null"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.img_size=128x64", (128, 64)),
        ("model.img_size=[128,64]", (128, 64)),
        ("model.img_size=128, 64", (128, 64)),
        ("optim.betas=0.9,0.99", (0.9, 0.99)),
        ("model.std=[1e-1, 1_0e-1, .5]", (0.1, 1.0, 0.5)),
        ("train.compile=off", False),
        ("train.compile=1", True),
        ("train.compile=No", False),
        ("seed=0x10", 16),
        ("seed=1_000", 1000),
        ("optim.lr=1e-3", 1e-3),
        ("train.epochs=2.5", 2.5),
        ("train.total_steps=1.0e3", 1000),
        ("engine.deepspeed.zero_stage=2", 2),
        ("checkpoint.resume=none", "none"),
        (
            "engine.deepspeed.extra={a: 1e-3, b: off, c: 2024-01-01, d: x #1}",
            {"a": 1e-3, "b": False, "c": "2024-01-01", "d": "x #1"},
        ),
        ("engine.deepspeed.extra.path=/a #b", {"path": "/a #b"}),
        ("engine.deepspeed.extra.path='5'", {"path": "5"}),
    ],
)
def test_other_keys_take_what_their_type_says(path, override, value):
    if override.endswith("d: x #1}"):
        override, value = override.replace(", d: x #1", ""), {k: v for k, v in value.items() if k != "d"}
    found: Any = load(path, override)
    for part in override.partition("=")[0].removesuffix(".path").split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "output"),
    [
        ("seed=010", "a number that begins with 0 is octal to some and decimal to others. Got 010"),
        ("seed=5 #x", "Got '5 #x'"),
        ("train.total_steps=12:30", "Got '12:30'"),
        ("train.total_steps=yes", "Got 'yes'"),
        ("optim.lr=true", "Got 'true'"),
        ("optim.lr=.inf", "finite"),
        ("optim.lr=1e999", "finite"),
        ("model.mean=[.nan,0,0]", "finite"),
        ("train.compile=maybe", "Got 'maybe'"),
        ("engine.deepspeed.zero_stage=9", "0, 1, 2 or 3"),
        ("run_dir=\udcff", "unable to parse raw data as a unicode string. Got '\\udcff'"),
        ("run_dir=", "at least 1 character"),
        ("data..shards=x", "must look like section.key=value"),
    ],
)
def test_what_a_type_cannot_be_is_told(path, override, output):
    message = refused(path, override)
    assert output in message
    if ".." not in override:
        assert "the command line" in message
        path.write_text(path.read_text() + "optim: {}\nmodel: {}\nengine: {}\n")
        nested = override.partition("=")[0].split(".")
        value = override.partition("=")[2]
        plain = "" if " " in value or not value or not value.isascii() else value
        if plain:  # a file says the same, but for the origin
            lines = "".join(f"{'  ' * n}{key}:{'' if n < len(nested) - 1 else f' {plain}'}\n" for n, key in enumerate(nested))
            path.write_text(MINIMAL + lines)
            assert output in refused(path)


def test_choices_that_other_readers_take_for_truth_values_stay_texts(tmp_path):
    class Switches(config.Section):
        mode: Literal["on", "off", "no"] = "no"
        size: Literal["auto"] | int = "auto"
        where: Annotated[str, "note"] | None = None
        many: tuple[str, ...] = ()

    (tmp_path / "x.yaml").write_text("mode: off\nsize: 12\nwhere: 007\nmany: [on, 1e3, 2024-01-01]\n")
    found = config.load(Switches, tmp_path / "x.yaml")
    assert (found.mode, found.size, found.where, found.many) == ("off", 12, "007", ("on", "1e3", "2024-01-01"))
    assert config.load(Switches, tmp_path / "x.yaml", ["size=auto", "mode=on"]).size == "auto"


@pytest.mark.parametrize(
    "text", ["1_000", "20240101", "null", "./~", "$HOME", "a$$b", "1e3", "1e-3", "0o7", "010", "=", "", "é", "\n x"]
)
def test_a_dump_gives_every_text_back(tmp_path, text):
    settings = config.Pretrain.model_validate(
        {"run_dir": text or "x", "data": {"shards": "in", "cache_dir": text}, "engine": {"deepspeed": {"extra": {"a": text}}}}
    )
    dumped = config.dump_yaml(settings)
    assert dumped.isascii()
    (tmp_path / "dump.yaml").write_text(dumped)
    assert load(tmp_path / "dump.yaml") == settings


def test_rendered_objects_are_the_same_to_readers_of_yaml_1_2():
    """``1e3`` is a text to PyYAML and a number to kubectl, which then refuses it where a text is wanted."""
    text = render.to_yaml([{"data": {"a": "1e3", "b": "on", "c": "0o7", "d": "x"}}])
    assert yaml.safe_load(text) == {"data": {"a": "1e3", "b": "on", "c": "0o7", "d": "x"}}
    assert read_tree(text, "x")["data"]["d"] == "x"
    assert not any(isinstance(read_tree(text, "x")["data"][key], Plain) for key in "abc")


# --- homes, variables ---


def test_homes_and_variables_are_expanded_in_places_alone(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("BUCKET", "b")
    path.write_text(
        "run_dir: ~/runs/$BUCKET\ndata: {shards: 's3://${BUCKET}/$$x/a$', cache_dir: ~}\ncheckpoint: {upload_to: s3://$BUCKET/~}\n"
        "engine: {deepspeed: {extra: {path: ~/$BUCKET}}}\n"
    )
    settings = load(path)
    assert settings.run_dir == "/home/me/runs/b"
    assert (settings.data.shards, settings.checkpoint.upload_to) == ("s3://b/$$x/a$", "s3://b/~")
    assert settings.engine.deepspeed.extra == {"path": "~/$BUCKET"}
    assert load(path, "run_dir=~", "data.cache_dir=~/$BUCKET-x").run_dir == "/home/me"
    path.with_name("tuned.yaml").write_text("run_dir: $BUCKET\nroot: ~/m\ninit: ${BUCKET}/r\n")
    tuned = config.load(config.Finetune, path.with_name("tuned.yaml"))
    assert (tuned.run_dir, tuned.root, tuned.init) == ("b", "/home/me/m", "b/r")


@pytest.mark.parametrize("key", ["a$b", "a$$b", "$HOME", "${HOME}", "${A:-b}", "a$", "~/$NO_SUCH"])
def test_a_key_of_a_store_is_taken_as_it_is_and_stays_so_when_it_is_written(path, key, monkeypatch):
    """``s3://b/a$$b`` meant another object, and ``a$b`` was refused."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("BUCKET", "b")
    settings = load(path, f"data.shards=s3://$BUCKET/{key}", "run_dir=/x/$$y")
    assert settings.data.shards == f"s3://b/{key}"
    path.write_text(config.dump_yaml(settings))
    assert load(path) == settings
    assert place(f"s3://$BUCKET/{key}") == f"s3://b/{key}"


def test_a_variable_in_the_place_of_a_bucket_must_be_set(path, monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    assert "variable NO_SUCH is not set or empty" in refused(path, "data.shards=s3://$NO_SUCH/x")
    assert locations.escape("s3://b") == "s3://b"


def test_a_base_is_found_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text(MINIMAL)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "run.yaml").write_text("_base_: ~/base.yaml\n")
    assert load(tmp_path / "sub" / "run.yaml").run_dir == "out"


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("$NO_SUCH/x", "the environment's variable NO_SUCH is not set or empty. Got $NO_SUCH/x"),
        ("${EMPTY}/x", "the environment's variable EMPTY is not set or empty"),
        ("${A:-b}", "a variable is written $NAME or ${NAME}, and $$ is a dollar"),
        ("~no_such_user/x", "~no_such_user must be a home directory and there is none"),
    ],
)
def test_a_variable_or_home_that_is_not_there_is_told(path, monkeypatch, text, output):
    monkeypatch.delenv("NO_SUCH", raising=False)
    monkeypatch.setenv("EMPTY", "")
    assert refused(path, f"run_dir={text}").startswith(f"'run_dir' in the command line: {output}")


def test_a_suite_hands_its_places_on_as_they_are(tmp_path, monkeypatch):
    from launcher.cluster import suite

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("data: {shards: x}\n")
    (tmp_path / "suite.yaml").write_text(SUITE.replace("results: out", "results: ~/a$$b") + "places: {s: $HOME}\n")
    (step,) = suite.load(tmp_path / "suite.yaml")
    assert step.run_dir == f"{tmp_path}/a$b/runs/a"
    assert load(step.config, *step.overrides).run_dir == step.run_dir


@pytest.mark.parametrize("text", [SUITE, SUITE.replace("stages:", "'stages' :"), "_base_: suite.yaml\nname: t\n"])
def test_a_suite_is_known_however_it_is_written(tmp_path, text):
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "x.yaml").write_text(text)
    assert is_suite(tmp_path / "x.yaml")
    assert not is_suite(tmp_path / "gone.yaml")
    (tmp_path / "x.yaml").write_text(MINIMAL + "# stages: none\n")
    assert not is_suite(tmp_path / "x.yaml")


def test_every_key_that_says_where_something_lies_is_a_place():
    places = {"run_dir", "root", "init", "shards", "cache_dir", "upload_to", "results"}
    sections = [*config.PROGRAMS.values(), Suite, config.Checkpoint, config.Pretrain.model_fields["data"].annotation]
    for section in sections:
        for name, field in section.model_fields.items():
            is_place = "place" in field.metadata or "'place'" in str(field.annotation)
            assert is_place == (name in places or (section.__name__ == "Stage" and name == "config")), name
    assert Place


# --- coding ---


def test_a_file_is_utf8_in_every_locale_and_may_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + "run_dir: out # für alle\ndata: {shards: größe}\n".encode())
    assert load(file).data.shards == "größe"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "personmae", "pretrain", file, "--print-config"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"run_dir: out\n")


def test_a_file_in_another_coding_is_told(path):
    path.write_bytes("run_dir: größe\n".encode("latin-1"))
    assert "must be a text file in UTF-8" in refused(path)
