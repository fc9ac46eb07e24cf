"""Options of fine-tuning and unsupervised training that were renamed or came later: old files and old runs go on."""

from pathlib import Path
from typing import Any

import pytest

from personmae import config, downstream
from personmae.errors import UserError
from personmae.keys import renamed

START = {"run_dir": "out", "root": "data", "init": "start"}


@pytest.fixture(autouse=True)
def _untold() -> None:
    renamed.print_new_name.cache_clear()


@pytest.mark.parametrize(("old", "new"), [("true", "standardise"), ("yes", "standardise"), ("false", "none")])
def test_an_old_truth_value_of_per_camera_is_taken_and_its_new_name_said_once(tmp_path, capsys, old, new):
    (tmp_path / "run.yaml").write_text(f"run_dir: out\nroot: in\ninit: start\ncluster:\n  per_camera: {old}\n")
    assert config.load(config.Unsupervised, tmp_path / "run.yaml").cluster.per_camera == new
    assert config.load(config.Unsupervised, tmp_path / "run.yaml", [f"cluster.per_camera={old}"]).cluster.per_camera == new
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"note: cluster.per_camera={old} is called cluster.per_camera={new} now\n"


@pytest.mark.parametrize("value", ["none", "standardise", "whiten"])
def test_the_names_of_today_are_taken_in_silence(tmp_path, capsys, value):
    (tmp_path / "run.yaml").write_text("run_dir: out\nroot: in\ninit: start\n")
    assert config.load(config.Unsupervised, tmp_path / "run.yaml", [f"cluster.per_camera={value}"]).cluster.per_camera == value
    assert capsys.readouterr().err == ""


def test_another_value_of_per_camera_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("run_dir: out\nroot: in\ninit: start\n")
    with pytest.raises(UserError, match=r"'none', 'standardise' or 'whiten'\. Got 'whitened'"):
        config.load(config.Unsupervised, tmp_path / "run.yaml", ["cluster.per_camera=whitened"])


def older(per_camera: bool) -> dict[str, Any]:
    """What a run wrote down of itself before the options of clusters, memory and optimizer came."""
    new = {"cluster.whiten_dim", "cluster.whiten_shrinkage", "cluster.drop_one_camera", "feature.columns"}
    new |= {"feature.whiten_retrieval", "memory.kind", "memory.intra_weight", "memory.inter_weight", "memory.num_negatives"}
    new |= {"optim.betas", "optim.schedule"}
    known = config.Unsupervised.model_validate(START).resume_key()
    assert new < known.keys()
    return {key: value for key, value in known.items() if key not in new} | {"cluster.per_camera": per_camera}


@pytest.mark.parametrize(("old", "new"), [(True, "standardise"), (False, "none")])
def test_a_run_from_before_an_option_goes_on_with_its_default_alone(old, new):
    settings = config.Unsupervised.model_validate(START | {"cluster": {"per_camera": new}})
    downstream.require_same("here", settings, settings.resume_key(), older(old))
    for section, option, value in (("memory", "kind", "camera"), ("optim", "schedule", "cosine"), ("cluster", "whiten_dim", 9)):
        other = config.Unsupervised.model_validate(START | {"cluster": {"per_camera": new}} | {section: {option: value}})
        if section == "cluster":
            other = config.Unsupervised.model_validate(START | {"cluster": {"per_camera": new, option: value}})
        with pytest.raises(UserError, match=rf"other settings or data: {section}\.{option}="):
            downstream.require_same("here", other, other.resume_key(), older(old))
    whitened = config.Unsupervised.model_validate(START | {"cluster": {"per_camera": "whiten"}})
    with pytest.raises(UserError, match=rf"cluster\.per_camera={new} \(now whiten\)"):
        downstream.require_same("here", whitened, whitened.resume_key(), older(old))


def test_a_run_that_says_nothing_of_itself_is_another_one():
    settings = config.Finetune.model_validate(START)
    with pytest.raises(UserError, match="other settings or data"):
        downstream.require_same("here", settings, settings.resume_key(), {})


def test_the_papers_configurations_keep_the_papers_choices():
    configs = Path(__file__).parents[2] / "configs"
    for name in ("usl_market1501", "usl_msmt17", "uda_market1501_to_msmt17", "uda_msmt17_to_market1501"):
        settings = config.load(config.Unsupervised, configs / f"{name}.yaml")
        assert (settings.optim.kind, settings.optim.schedule, settings.memory.kind) == ("sgd", "step", "cluster")
        assert (settings.memory.momentum, settings.memory.temperature, settings.memory.mode) == (0.1, 0.05, "mean")
        assert (settings.cluster.per_camera, settings.cluster.drop_one_camera) == ("none", False)
        assert (settings.feature.pool, settings.feature.whiten_retrieval) == ("mean", False)
