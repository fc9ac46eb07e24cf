"""Configuration: what comes from where, and one line for every mistake."""

import re
from pathlib import Path

import pytest
import yaml

from personmae import config
from personmae.commands.arguments import Parser
from personmae.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
MINIMAL = "run_dir: out\ndata:\n  shards: in\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    return file


def refused(path: Path, *overrides: str, kind: type[config.Section] = config.Pretrain) -> str:
    with pytest.raises(UserError) as caught:
        config.load(kind, path, overrides)
    return str(caught.value)


def kind_of(path: Path) -> type[config.Section] | None:
    """The program that a file is for, as its header's command says; None for a suite of several."""
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    if "submit" in header:
        return None
    own = [
        word
        for word in ("pretrain", "finetune", "unsupervised")
        if re.search(rf"{word}(\.py --config)? configs/{path.name}", header)
    ]
    return {"pretrain": config.Pretrain, "finetune": config.Finetune, "unsupervised": config.Unsupervised}[own[0]]


# --- what is read ---


def test_configs_are_found():
    assert [path.name for path in CONFIGS if path.name == "quickstart.yaml"]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_of_the_repository_loads_and_round_trips(file, tmp_path):
    kind = kind_of(file)
    if kind is None:
        return
    settings = config.load(kind, file)
    (tmp_path / "again.yaml").write_text(config.dump_yaml(settings))
    assert config.load(kind, tmp_path / "again.yaml") == settings


def test_the_defaults_are_the_papers(path):
    settings = config.load(config.Pretrain, path)
    assert (settings.model.size, settings.model.img_size, settings.model.patch_size) == ("base", (256, 128), 16)
    assert (settings.mask.kind, settings.mask.ratio, settings.regions.max_shift) == ("block", 0.75, 64)
    assert (settings.loss.feature_weight, settings.loss.beta, settings.decoders.depth) == (1.0, 2.0, 2)
    assert (settings.mask.block_ratio, settings.decoders.visible_positions, settings.loss.identity_weight) == (None, False, 0.0)
    assert (settings.target.features, settings.target.reduction) == ("layer_norm", "mean")
    assert (settings.teacher.momentum, settings.teacher.ramp_fraction) == ((0.999, 0.9999), 0.2)
    assert settings.optim.base_lr * settings.train.global_batch_size / 256 == pytest.approx(1.2e-3)
    assert (settings.train.epochs, settings.optim.weight_decay, settings.optim.warmup_fraction) == (100, 0.05, 0.2)


def test_the_command_line_overrides_the_file_the_file_its_base_and_the_base_the_default(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(MINIMAL + "seed: 1\noptim:\n  base_lr: 1.0\n  min_lr: 1.0\n  lr: 1.0\n")
    (tmp_path / "sub" / "run.yaml").write_text("_base_: ../base.yaml\noptim:\n  min_lr: 2.0\n  lr: 2.0\n")
    settings = config.load(config.Pretrain, tmp_path / "sub" / "run.yaml", ["optim.lr=3"])
    assert (settings.optim.base_lr, settings.optim.min_lr, settings.optim.lr) == (1.0, 2.0, 3.0)
    assert (settings.seed, settings.optim.weight_decay) == (1, 0.05)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.lr=1e-3", "optim", "lr", 1e-3),  # YAML alone takes 1e-3 for a text
        ("optim.lr=null", "optim", "lr", None),
        ("model.img_size=[128, 64]", "model", "img_size", (128, 64)),
        ("teacher.momentum=[0.9,0.99]", "teacher", "momentum", (0.9, 0.99)),
        ("train.compile=false", "train", "compile", False),
        ("train.total_steps=20", "train", "total_steps", 20),
        ("data.shards=s3://bucket/a=b", "data", "shards", "s3://bucket/a=b"),
        ("engine.deepspeed.extra.comms_logger.enabled=true", "engine", "deepspeed", {"comms_logger": {"enabled": True}}),
    ],
)
def test_overrides_are_typed(path, override, section, key, value):
    found = getattr(getattr(config.load(config.Pretrain, path, [override]), section), key)
    assert (found.extra if key == "deepspeed" else found) == value


def test_the_last_of_two_overrides_counts(path):
    assert config.load(config.Pretrain, path, ["seed=1", "seed=2"]).seed == 2


def test_a_dump_reads_back_as_the_same_configuration_with_the_same_hash(path, tmp_path):
    overrides = ["optim.lr=1e-5", "model.img_size=[128,64]", "teacher.horizon_scaling=true", "optim.max_norm=3.0"]
    settings = config.load(config.Pretrain, path, [*overrides, "engine.deepspeed.extra.a.b=[1, x]"])
    (tmp_path / "dump.yaml").write_text(config.dump_yaml(settings))
    again = config.load(config.Pretrain, tmp_path / "dump.yaml")
    assert again == settings
    assert config.config_hash(again) == config.config_hash(settings)
    assert set(yaml.safe_load(config.dump_yaml(settings))) == set(config.Pretrain.model_fields)


def test_the_hash_tells_configurations_apart(path):
    hashes = {config.config_hash(config.load(config.Pretrain, path, o)) for o in ([], ["seed=1"], ["mask.ratio=0.7"])}
    assert len(hashes) == 3


def test_a_configuration_cannot_be_changed(path):
    settings = config.load(config.Pretrain, path)
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 3


# --- mistakes ---


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.base_lrr", "optim.base_lr"),
        ("modle", "model"),
        ("mask.ration", "mask.ratio"),
        ("engine.deepspeed.zero_stge", "engine.deepspeed.zero_stage"),
    ],
)
def test_an_unknown_key_on_the_command_line_names_the_nearest_one(path, key, nearest):
    expected = f"unknown key '{key}' in the command line. The nearest known key is '{nearest}'"
    assert refused(path, f"{key}=1") == expected


def test_an_unknown_key_in_a_file_names_that_file(tmp_path):
    (tmp_path / "base.yaml").write_text(MINIMAL + "optim:\n  weight_decy: 0.1\n")
    (tmp_path / "run.yaml").write_text("_base_: base.yaml\noptim:\n  lr: 0.1\n")
    message = refused(tmp_path / "run.yaml")
    assert message.startswith(f"unknown key 'optim.weight_decy' in {tmp_path / 'base.yaml'}. ")
    assert message.endswith("'optim.weight_decay'")


def test_a_wrong_type_names_key_origin_and_value(path):
    path.write_text(MINIMAL + "train:\n  total_steps: many\n")
    message = refused(path)
    assert message.startswith(f"'train.total_steps' in {path}: ")
    assert "integer" in message
    assert message.endswith("Got 'many'")
    assert "'optim.lr' in the command line: " in refused(path, "train.total_steps=3", "optim.lr=fast")


@pytest.mark.parametrize(
    ("override", "output"),
    [
        ("mask.ratio=1.0", "less than 1"),
        ("mask.ratio=0", "greater than 0"),
        ("mask.block_ratio=0.8", "block_ratio=0.8 must be at most ratio=0.75. Lower it or leave it out"),
        ("mask.kind=people", "'block', 'random' or 'person'"),
        ("target.features=normed", "'layer_norm', 'raw', 'position_centred' or 'image_centred'"),
        ("loss.identity_group=1", "greater than 1"),
        ("model.size=huge", "'micro', 'tiny', 'small', 'base' or 'large'"),
        ("train.global_batch_size=0", "greater than 0"),
        ("train.global_batch_size=2.5", "integer"),
        ("teacher.momentum=[0.9, 1.5]", "less than or equal to 1"),
        ("model.img_size=[256, x]", "model.img_size"),
        ("model.img_size=[250, 128]", "img_size=(250, 128) must be multiples of patch_size=16"),
        ("model.mean=[128, 128, 128]", "mean must be three numbers from 0 to 1. Got (128, 128, 128): divide numbers of 0"),
        ("model.mean=[-0.1, 0, 0]", "mean must be three numbers from 0 to 1. Got (-0.1, 0, 0)"),
        ("model.std=[0.5, 0, 0.5]", "std must be above 0 and at most 1, three numbers. Got (0.5, 0, 0.5)"),
        ("model.std=[0.5, 58, 0.5]", "Got (0.5, 58, 0.5): divide numbers of 0 ... 255 by 255"),
        ("model=3", "valid dictionary"),
    ],
)
def test_a_value_out_of_range_is_told(path, override, output):
    message = refused(path, override)
    assert output in message
    assert "the command line" in message
    assert "\n" not in message


def test_a_missing_value_names_the_key_and_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("run_dir: out\n")
    assert refused(tmp_path / "run.yaml").startswith(f"'data' is required and {tmp_path / 'run.yaml'} does not set it")
    (tmp_path / "run.yaml").write_text("run_dir: out\ndata: {}\n")
    message = refused(tmp_path / "run.yaml")
    assert message.startswith("'data.shards' is required")
    assert message.endswith("give data.shards=VALUE")


def test_a_missing_value_may_come_from_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("data:\n")
    assert config.load(config.Pretrain, tmp_path / "run.yaml", ["run_dir=x", "data.shards=y"]).data.shards == "y"


def test_a_missing_file_names_those_beside_it(path):
    message = refused(path.with_name("rnu.yaml"))
    assert f"{path.with_name('rnu.yaml')} does not exist (yaml files beside it: {path})" in message
    assert "none there" in refused(path.parent / "nowhere" / "run.yaml")
    assert f"{path.parent} is a folder" in refused(path.parent)


@pytest.mark.parametrize("content", ["- a\n- b\n", "just a text", "", "3"])
def test_a_file_that_holds_no_keys_is_told(path, content):
    path.write_text(content)
    assert "must hold 'key: value' lines" in refused(path)


def test_a_file_that_is_not_yaml_is_named(path):
    path.write_text("model: [1, 2")
    assert refused(path).startswith(f"{path} must be YAML")


@pytest.mark.parametrize("override", ["seed", "=3", ""])
def test_an_override_without_a_key_or_a_value_is_told(path, override):
    assert f"must look like section.key=value. Got '{override}'" in refused(path, override)


def test_an_override_that_is_not_yaml_names_its_key(path):
    assert refused(path, "model.img_size=[1").startswith("the value of model.img_size must be YAML")


@pytest.mark.parametrize("back", ["a.yaml", "../{here}/a.yaml"])
def test_bases_that_lead_in_a_circle_are_told(tmp_path, back):
    (tmp_path / "a.yaml").write_text("_base_: b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"_base_: {back.format(here=tmp_path.name)}\n")
    assert "_base_ must not lead back to the same file" in refused(tmp_path / "a.yaml")


def test_a_base_that_is_missing_is_named(path):
    path.write_text("_base_: nowhere.yaml\n")
    assert f"{path.parent / 'nowhere.yaml'} does not exist" in refused(path)


def test_fine_tuning_has_its_own_keys(path):
    path.write_text("run_dir: out\nroot: in\ninit: random\n")
    assert config.load(config.Finetune, path, ["batch.num_ids=4"]).batch.num_ids == 4
    assert refused(path, "mask.ratio=0.5", kind=config.Finetune).startswith("unknown key 'mask' in the command line")


@pytest.mark.parametrize("kind", [config.Pretrain, config.Finetune])
def test_every_section_is_frozen_and_refuses_unknown_keys(kind):
    sections = [field.annotation for field in kind.model_fields.values()]
    for section in [kind, *(s for s in sections if isinstance(s, type) and issubclass(s, config.Section))]:
        assert section.model_config.get("frozen") is True
        assert section.model_config.get("extra") == "forbid"


def test_overrides_may_stand_before_and_behind_options_but_other_words_may_not(capsys):
    parser = Parser(prog="p")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--gpus", type=int)
    found = parser.parse_args(["c.yaml", "a.b=1", "--gpus", "8", "c.d=2"])
    assert (found.config, found.gpus, found.overrides) == ("c.yaml", 8, ["a.b=1", "c.d=2"])
    with pytest.raises(SystemExit, match="78"):
        parser.parse_args(["c.yaml", "--gpus", "8", "word"])
    with pytest.raises(SystemExit, match="78"):
        parser.parse_args(["c.yaml", "--gpu=8x"])
    assert "unrecognized arguments: word" in capsys.readouterr().err


def test_settings_that_came_later_are_filled_in_as_a_run_of_before_had_them(path):
    settings = config.load(config.Pretrain, path)
    now, before = settings.resume_key(), config.Pretrain.resume_key_before()
    assert before.items() <= now.items()
    assert {key.split(".")[0] for key in before} == {"decoders", "loss", "mask", "target"}
    other = config.load(config.Pretrain, path, ["mask.block_ratio=0.5", "target.features=raw"]).resume_key()
    assert {key for key in before if other[key] != before[key]} == {"mask.block_ratio", "target.features"}
