"""An imported encoder starts fine-tuning, unsupervised training and a continued pre-training, and keeps what it is."""

import json
import re
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from people import FEW_CLUSTERS, draw_few_people
from test_foreign import GOLDEN
from torch import Tensor
from torch.testing import assert_close

import personmae
from personmae import config, evaluate, finetune, precision, unsupervised
from personmae.__main__ import main
from personmae.checkpoint import portable
from personmae.errors import UserError
from personmae.model.vit import VisionTransformer, patchify
from personmae.pretrain_start import read_start
from personmae.pretrain_state import build_model
from personmae.weights import importer
from personmae.weights.importer import Options

CONFIGS = Path(__file__).parents[2] / "configs"
FP32 = precision.choose("fp32", "cpu")
TALL = ["HAP", "TransReID-SSL", "PASS", "TransReID", "CLIP-ReID"]  # each kind of positions, registers, and CLIP's variants


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Imported encoders by family."""
    folder, found = tmp_path_factory.mktemp("imported"), {}
    for name in TALL:
        found[name] = folder / f"{name}.out"
        importer.run(str(foreign.write(name, folder)), found[name], Options(), lambda _: None)
    return found


def settings_of(kind: type[Any], init: Path, **changes: Any) -> Any:
    values = {"run_dir": "-", "init": str(init), "model": {"size": "tiny"}, **changes}
    return kind.model_validate(values | ({"data": {"shards": "-"}} if kind is config.Pretrain else {"root": "-"}))


def class_tokens(encoder: VisionTransformer, images: Tensor) -> Tensor:
    encoder.eval()
    height, width = images.shape[2:]
    coords = encoder.coords((height, width)).expand(len(images), -1, -1)
    with torch.no_grad():
        return encoder(patchify(images, encoder.patch_size, encoder.stride), coords)[:, 0, ::4]


@pytest.mark.parametrize("name", TALL)
@pytest.mark.parametrize("program", ["finetune", "unsupervised", "pretrain"])
def test_a_training_begins_with_the_projects_own_tokens(name, program, outs):
    """In fine-tuning at the stride that the weights had. In pre-training patches touch, so a table for overlap is resampled."""
    overlapping = name in ("TransReID", "CLIP-ReID")
    model = {"size": "tiny"} | ({"stride": 12} if overlapping and program != "pretrain" else {})
    if program == "finetune":
        settings = settings_of(config.Finetune, outs[name], model=model, head={"kind": "bnneck"}, train={"drop_path_rate": 0.0})
        module, record = finetune.build(settings, 5, FP32)
        encoder = module.model.encoder
    elif program == "unsupervised":
        module, record = unsupervised.build(settings_of(config.Unsupervised, outs[name], model=model), FP32)
        encoder = module.model.encoder
    else:
        start = read_start(settings_of(config.Pretrain, outs[name]))
        assert start
        encoder, record = build_model(start.settings, FP32, start).encoder, start.settings.model.model_dump(mode="json")
    assert record["mean"] == portable.read_state(outs[name])["model"]["mean"]
    expected = torch.tensor(GOLDEN[name]["cls"])
    if overlapping and program == "pretrain":
        assert encoder.table == (16, 8)
        return
    assert_close(class_tokens(encoder, foreign.images(name)), expected, rtol=0, atol=1e-4)


def test_an_encoder_goes_on_at_another_stride_with_its_positions_in_between(outs):
    settings = settings_of(
        config.Finetune, outs["TransReID-SSL"], model={"size": "tiny", "stride": 12}, head={"kind": "bnneck"}
    )
    encoder = finetune.build(settings, 5, FP32)[0].model.encoder
    assert encoder.grid((256, 128)) == (21, 10)
    coords = encoder.coords((256, 128)).reshape(21, 10, 2)
    assert_close(coords[:, 0, 0], torch.arange(21) * 0.75)  # 12 of 16 pixels
    assert_close(coords[4, 4], torch.tensor([3.0, 3.0]))  # the fourth one is where the third of 16 is
    assert encoder.pos_embed is not None
    assert_close(encoder.positions(coords[4, 4][None])[0], encoder.pos_embed[0, 3 * 8 + 3], rtol=0, atol=1e-6)


def test_another_size_normalisation_or_patch_is_refused_in_one_line(outs):
    for model, reason in (
        ({"size": "small"}, r"model\.size=small must be that of .*, which is tiny\. Give model\.size=tiny"),
        ({"size": "tiny", "patch_size": 8}, r"model\.patch_size=8 must be that of"),
        ({"size": "tiny", "mean": [0.5] * 3}, r"model\.mean=.* must be that of .*, which is \[0\.485, 0\.456, 0\.406\]"),
    ):
        for kind in (config.Finetune, config.Pretrain):
            settings = settings_of(kind, outs["PASS"], model=model)
            with pytest.raises(UserError, match=reason):
                _ = finetune.build(settings, 5, FP32) if kind is config.Finetune else read_start(settings)
    with pytest.raises(ValueError, match="stride=20 must be at most patch_size=16"):
        settings_of(config.Finetune, outs["PASS"], model={"size": "tiny", "stride": 20})


# --- whole runs ---


def shared(init: Path, run_dir: Path, *overrides: str) -> list[str]:
    small = [
        "model.size=tiny",
        "model.img_size=64,32",
        "train.precision=fp32",
        "train.log_every=1",
        "checkpoint.every_steps=99",
    ]
    return [f"init={init}", f"run_dir={run_dir}", *small, *overrides]


def pretraining(init: Path, run_dir: Path, shards: Path, *overrides: str) -> list[str]:
    small = [f"data.shards={shards}", "data.num_threads=1", "data.shuffle_block_size=32", "regions.max_shift=16"]
    small += ["train.global_batch_size=4", "train.total_steps=4", "engine.name=native", *overrides]
    return ["pretrain", str(CONFIGS / "quickstart.yaml"), *shared(init, run_dir, *small)]


@pytest.mark.integration
@pytest.mark.usefixtures("restore_signals")
def test_a_pre_training_goes_on_from_imported_weights_resumes_and_hands_them_on(outs, shard_dir, tmp_path, capsys, monkeypatch):
    """PASS: a table that is brought to another grid, and registers, through pre-training, resume, fine-tuning and load."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run, market = tmp_path / "run", draw_few_people(tmp_path, 4, distractors=1, junk=1) / "market1501"
    assert main(pretraining(outs["PASS"], run, shard_dir, "train.total_steps=2")) == 0
    out = capsys.readouterr().out
    assert f"all 151 tensors of the encoder come from {outs['PASS']}, with learned positions. The decoders start new" in out
    weights, settings = portable.read_encoder(run)
    assert settings["encoder"] == {"num_registers": 3, "table": [4, 2]}
    assert settings["mean"] == [0.485, 0.456, 0.406]
    assert weights["pos_embed"].shape == (1, 8, 192)
    first = portable.read_encoder(outs["PASS"])[0]
    assert 0 < (weights["blocks.0.attn.qkv.weight"] - first["blocks.0.attn.qkv.weight"]).abs().max() < 0.01

    assert main(pretraining(outs["PASS"], run, shard_dir, "train.total_steps=2")) == 0  # it is complete
    assert "is complete" in capsys.readouterr().out
    assert main(pretraining(outs["TransReID-SSL"], run, shard_dir, "train.total_steps=2")) == 78
    assert re.search(r"belongs to a run with other settings: init=", capsys.readouterr().err)
    assert main(pretraining(Path("random"), run, shard_dir, "train.total_steps=2", "model.mean=0.485,0.456,0.406")) == 78

    tuned = tmp_path / "tuned"
    few = [f"root={market}", "batch.num_ids=2", "batch.num_instances=2", "train.epochs=1", "train.bn_group_size=4"]
    few += ["head.embed_dim=8", "model.stride=12"]
    assert main(["finetune", str(CONFIGS / "quickstart_personmae.yaml"), *shared(run, tuned, *few)]) == 0
    state = portable.read_state(portable.locate(tuned))
    assert state["model"]["encoder"] == {"num_registers": 3, "table": [4, 2]}
    assert (state["model"]["stride"], state["model"]["trained_size"]) == (12, [64, 32])
    loaded = personmae.load(tuned, device="cpu")
    crops = sorted(map(str, (market / "query").glob("*.jpg")))[:3]
    path = portable.locate(tuned)
    model = evaluate.load_model(portable.read(path), path)
    with torch.no_grad():
        expected = model.features(torch.stack([loaded.preprocess(crop) for crop in crops]))
    assert_close(loaded.features(crops), expected, rtol=1e-5, atol=1e-6)
    record = json.loads((tuned / "result.json").read_text())
    assert 0 < record["mAP"] <= 1


@pytest.mark.integration
@pytest.mark.usefixtures("restore_signals")
def test_unsupervised_training_and_the_probe_take_imported_weights(outs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    market = draw_few_people(tmp_path, 6, distractors=1, junk=1) / "market1501"
    few = [f"root={market}", *FEW_CLUSTERS, "cluster.eps=0.6", "batch.num_ids=2", "batch.num_instances=2", "train.epochs=1"]
    few += ["train.iters_per_epoch=2", "train.bn_group_size=4"]
    usl = tmp_path / "usl"
    assert main(["unsupervised", str(CONFIGS / "quickstart_usl.yaml"), *shared(outs["CLIP-ReID"], usl, *few)]) == 0
    options = portable.read_state(portable.locate(usl))["model"]["encoder"]
    assert options["activation"] == "quick_gelu"
    assert options["table"] == [21, 10]
    assert main(["evaluate", str(outs["HAP"]), "market1501", str(market), "--probe"]) == 0
    assert "HAP.out, rows" in capsys.readouterr().out
