"""Weights of other projects: found by their names, equal to their own forward pass, and refused with a reason."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

import personmae
from personmae.__main__ import main
from personmae.checkpoint import portable
from personmae.commands import arguments
from personmae.errors import UserError
from personmae.model.positions import x_first
from personmae.model.vit import build_encoder, patchify
from personmae.weights import importer
from personmae.weights.importer import Options

GOLDEN: dict[str, dict[str, list[list[float]]]] = json.loads(
    (Path(__file__).parents[1] / "golden/foreign_features.json").read_text()
)
IMAGENET = [0.485, 0.456, 0.406]


def tokens(where: Path, images: Tensor) -> Tensor:
    """Tokens after the final norm (B, 1 + L, D) of an imported encoder, as every program builds it."""
    weights, settings = portable.read_encoder(where)
    encoder = build_encoder(settings).eval()
    portable.load_strictly(encoder, weights, where)
    height, width = images.shape[2:]
    coords = encoder.coords((height, width)).expand(len(images), -1, -1)
    with torch.no_grad():
        return encoder(patchify(images, encoder.patch_size, encoder.stride), coords)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture(scope="module", params=foreign.FILES)
def imported(request: pytest.FixtureRequest, folder: Path) -> tuple[str, Path, str]:
    """A family, the folder that its file became, and what was printed."""
    lines: list[str] = []
    out = folder / f"{request.param}.out"
    importer.run(str(foreign.write(request.param, folder)), out, Options(), lines.append)
    return request.param, out, "\n".join(lines)


# --- each family ---

FAMILIES = {
    "MAE": "MAE",
    "HAP": "HAP",
    "DINO": "DINO",
    "TransReID-SSL": "TransReID-SSL",
    "PersonViT": "PersonViT",
    "CION": "CION",
    "PASS": "PASS",
    "TransReID": "TransReID or its kin, fine-tuned",
    "TransReID with parts": "TransReID or its kin, fine-tuned",
    "CLIP-ReID": "CLIP-ReID",
    "plain": "a plain ViT",
}


def test_tokens_are_those_of_the_projects_own_forward_pass(imported):
    name, out, _ = imported
    found = tokens(out, foreign.images(name))[..., ::4]
    for reading, vectors in (("cls", found[:, 0]), ("mean", found[:, 1:].mean(dim=1))):
        expected = torch.tensor(GOLDEN[name][reading])
        assert expected.std() > 0.02
        assert_close(vectors, expected, rtol=0, atol=1e-4)


def test_the_family_is_found_by_its_names(imported):
    name, out, said = imported
    record = portable.read_state(out)
    assert record["import"]["family"] == FAMILIES[name]
    assert f"is {FAMILIES[name]}, a ViT of size tiny with patches of 16 pixels" in said
    needed = {"MAE": 149, "HAP": 149, "PASS": 151, "CLIP-ReID": 151}.get(name, 150)
    assert f"all {needed} tensors that the encoder needs are there" in said
    assert (
        f"{out} is written. It starts finetune, unsupervised and pretrain with init={shlex.quote(str(out))} model.size=tiny"
        in said
    )


def test_what_was_left_out_is_counted_by_name(imported):
    name, _, said = imported
    left_out = {
        "MAE": "decoder_blocks (12), decoder_embed (2), decoder_norm (2), decoder_pos_embed (1), decoder_pred (2), "
        "mask_token (1)",
        "DINO": "head (4)",
        "PASS": "head (2)",
        "TransReID": "bottleneck (5), classifier (1), fc (2), sie_embed (1)",
        "TransReID with parts": "b2 (14), bottleneck (25), classifier (5), fc (2)",
        "CLIP-ReID": "bottleneck (5), bottleneck_proj (5), classifier (1), classifier_proj (1), cv_embed (1), proj (1), "
        "prompt_learner (2), text_encoder (13)",
        "CION": None,
    }
    if name in left_out:
        found = re.search(r"tensors are the encoder's(?:\. Left out: (.*))?", said)
        assert found
        assert found[1] == left_out[name]
    assert ("those of b1, the branch that sees the whole person" in said) == (name == "TransReID with parts")


def test_positions_size_and_normalisation_travel_along(imported):
    name, out, said = imported
    model = portable.read_state(out)["model"]
    overlapping, fixed = name in ("TransReID", "CLIP-ReID"), name in ("MAE", "HAP")
    assert tuple(model["img_size"]) == foreign.SIZES.get(name, (256, 128))
    assert model.get("stride") == (12 if overlapping else None)
    h, w = (21, 10) if overlapping else (14, 14) if name in foreign.SIZES else (16, 8)
    assert model.get("encoder", {}).get("table") == (None if fixed else [h, w])
    assert ("fixed sines and cosines" if fixed else "a learned table") + f" of {h}x{w} patches" in said
    half = name.startswith(("TransReID", "CLIP")) and name != "TransReID-SSL"
    assert model["mean"] == ([0.5] * 3 if half else IMAGENET)
    assert f"normalisation: mean {'(0.5, 0.5, 0.5)' if half else '(0.485, 0.456, 0.406)'}" in said


def test_load_gives_features_of_an_imported_encoder_and_of_its_file_alike(folder, tmp_path):
    file = foreign.write("TransReID", folder)
    importer.run(str(file), tmp_path / "out", Options(), lambda _: None)
    images = [torch.rand(3, 90, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    loaded, direct = personmae.load(tmp_path / "out", device="cpu"), personmae.load(file, device="cpu")
    assert loaded.config["kind"] == "encoder"
    assert loaded.config["feature"] == "cls"
    assert torch.equal(loaded.features(images), direct.features(images))
    batch = torch.stack([loaded.preprocess(image) for image in images])
    expected = torch.nn.functional.normalize(tokens(tmp_path / "out", batch)[:, 0], dim=1)
    assert_close(loaded.features(images), expected, rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="is pre-trained only"):
        personmae.load(foreign.write("HAP", folder), device="cpu")


# --- positions ---


def test_fixed_positions_that_have_y_first_are_brought_to_ours_exactly(tmp_path):
    weights = {name: t for name, t in foreign.mae()["model"].items() if not name.startswith("decoder") and name != "mask_token"}
    half = foreign.WIDTH // 2
    theirs = x_first({name: t for name, t in weights.items() if name != "pos_embed"}, {"size": "tiny"})
    theirs["pos_embed"] = weights["pos_embed"].roll(half, dims=2)  # what y first means: the halves of each row exchanged
    save_file({name: t.contiguous() for name, t in theirs.items()}, tmp_path / "y_first.safetensors")
    lines: list[str] = []
    importer.run(str(tmp_path / "y_first.safetensors"), tmp_path / "out", Options(), lines.append)
    assert "where y comes first: all weights are permuted so that x does, exactly" in "\n".join(lines)
    found = tokens(tmp_path / "out", foreign.images("MAE"))[..., ::4]
    assert_close(found[:, 0], torch.tensor(GOLDEN["MAE"]["cls"]), rtol=0, atol=1e-4)


def test_a_learned_table_at_another_size_keeps_the_middle_of_a_patch_where_it_is(folder, tmp_path):
    """As bilinear interpolation of the table does, which is what these projects' own loaders do."""
    importer.run(str(foreign.write("CION", folder)), tmp_path / "out", Options(img_size=(384, 128)), lambda _: None)
    weights, settings = portable.read_encoder(tmp_path / "out")
    assert (settings["img_size"], settings["trained_size"]) == ([384, 128], [256, 128])
    encoder = build_encoder(settings)
    portable.load_strictly(encoder, weights, tmp_path)
    rows = weights["pos_embed"].reshape(1, 16, 8, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(rows, size=(24, 8), mode="bilinear").flatten(2)[0].T
    assert_close(encoder.positions(encoder.coords((384, 128))), expected, rtol=0, atol=1e-5)


def test_img_size_and_normalisation_can_be_given(folder, tmp_path, capsys):
    file, out = str(foreign.write("MAE", folder)), tmp_path / "out"
    given = ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6", "--img-size", "256x128"]
    assert main(["import", file, str(out), *given]) == 0
    model = portable.read_state(out)["model"]
    assert (model["img_size"], model["trained_size"]) == ([256, 128], [224, 224])
    assert (model["mean"], model["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert "normalisation: mean (0.1, 0.2, 0.3), std (0.4, 0.5, 0.6), as given" in capsys.readouterr().out


# --- timm ---


def test_a_model_of_timms_is_read_from_a_file_or_from_its_cache(tmp_path, monkeypatch):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    save_file(foreign.plain(), tmp_path / "model.safetensors")
    importer.run(f"timm:{name}", tmp_path / "out", Options(file=tmp_path / "model.safetensors"), lambda _: None)
    assert_close(
        tokens(tmp_path / "out", foreign.images("plain"))[:, 0, ::4], torch.tensor(GOLDEN["plain"]["cls"]), rtol=0, atol=1e-4
    )
    assert portable.read_state(tmp_path / "out")["model"]["mean"] == [0.5] * 3  # timm knows
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: str(tmp_path / file))
    importer.run(f"timm:{name}", tmp_path / "cached", Options(), lambda _: None)
    assert torch.equal(tokens(tmp_path / "cached", foreign.images("plain")), tokens(tmp_path / "out", foreign.images("plain")))


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_patch16_224", pytest.param("vit_base_patch16_clip_quickgelu_224", marks=pytest.mark.slow)],
)
def test_a_model_of_timms_gives_timms_own_tokens(name, tmp_path):
    import timm

    torch.manual_seed(0)
    model: Any = timm.create_model(name, pretrained=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    lines: list[str] = []
    importer.run(f"timm:{name}", tmp_path / "my out", Options(file=tmp_path / "weights.pth"), lines.append)
    (tmp_path / "my out").rename(tmp_path / "out")
    assert "tensors are the encoder's. Left out: head (2)" in "\n".join(lines)
    assert f"init='{tmp_path}/my out' model.size=" in lines[-1]
    images = foreign.images("plain")
    with torch.no_grad():
        assert_close(tokens(tmp_path / "out", images), model.forward_features(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_nothing", "the name of one of timm's models is required. Got 'vit_nothing'"),
        ("vit_tinny_patch16_224", "Got 'vit_tinny_patch16_224'. Near it are vit_tiny_patch16_224, "),
        ("vit_tiny_patch16_224.nope", "Near it are vit_tiny_patch16_224.augreg_in21k, "),
        ("resnet18", "a plain Vision Transformer is required. timm's resnet18 is a ResNet"),
        ("deit3_small_patch16_224", "its blocks have a layer scale"),
        ("vit_tiny_patch16_224", "weights in timm's cache are required. Those of vit_tiny_patch16_224 are not there"),
    ],
)
def test_a_model_of_timms_that_cannot_be_read_is_refused(name, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UserError, match=re.escape(reason)):
        importer.read(f"timm:{name}", Options())


# --- what is refused ---


def changed(**changes: Any) -> dict[str, Any]:
    """timm's names, with some tensors exchanged, added, or taken out where a change is None."""
    weights = foreign.plain() | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


NONE = torch.zeros(3)
SWIN = {
    "teacher": {
        "backbone.patch_embed.projection.weight": NONE,
        "backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table": NONE,
    }
}
REFUSED: dict[str, tuple[Any, str]] = {
    "a Swin": (SWIN, "is none: it is a Swin transformer"),
    "a convolutional stem": (
        {"teacher": {"module.backbone.cls_token": NONE, "module.backbone.patch_embed.conv.0.weight": NONE}},
        "is none: its patches come from a convolutional stem",
    ),
    "RoPE and layer scale": (
        changed(rope_embed__periods=NONE, blocks__0__ls1__gamma=NONE, pos_embed=None),
        "is none: it has rotary positions (RoPE) and its blocks have a layer scale",
    ),
    "no class token": (changed(cls_token=None), "is none: it has no class token"),
    "a ResNet": ({"conv1.weight": NONE, "layer1.0.conv1.weight": NONE}, "is none: it is a convolutional network"),
    "something else": ({"a": NONE}, "is none: it has no patch embedding, and its first names are a"),
    "no tensors": ({"epoch": 3}, "tensors by name are required"),
    "no dictionary": ([1, 2], "tensors by name are required"),
    "no positions": (changed(pos_embed=None), "learned or fixed positions (pos_embed) are required"),
    "unknown positions": (
        changed(pos_embed=torch.zeros(1, 38, 192)),
        "There are 37 of patches of 16 pixels: give --img-size HxW",
    ),
    "a missing tensor": (changed(blocks__3__attn__qkv__bias=None), "has 149: blocks.3.attn.qkv.bias is missing"),
    "a wrong shape": (changed(blocks__3__attn__qkv__bias=NONE), "has 149: blocks.3.attn.qkv.bias is 3 instead of 576"),
    "another width": (
        changed(patch_embed__proj__weight=torch.zeros(200, 3, 16, 16)),
        "has 200 and 12, with an MLP of 3.84 widths",
    ),
    "another MLP": (changed(blocks__0__mlp__fc1__weight=torch.zeros(576, 192)), "with an MLP of 3 widths"),
    "grey images": (
        changed(patch_embed__proj__weight=torch.zeros(192, 1, 16, 16)),
        "square patches of three colours are required",
    ),
    "more in a block": (changed(blocks__0__adapter__weight=NONE), "plain blocks of norms, attention and an MLP are required"),
    "code in it": (
        changed() | {"args": RunsCode()},
        "wants to run posix.system, which was not done: load it where you trust it",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_plain_encoder_is_refused_in_one_line_and_nothing_is_left(what, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, reason = REFUSED[what]
    torch.save(content, "weights.pth")
    assert main(["import", "weights.pth", "out"]) == 78
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert reason in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.pth"]  # no output, and no code has run


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused_in_one_line(suffix, share, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(f"weights{suffix}")
    torch.save(foreign.cion(), path) if suffix == ".pth" else save_file(foreign.plain(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert main(["import", str(path), "out"]) == 78
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"error: a whole .*file.* is required\. weights\{suffix} is damaged", error)
    assert "If yo" not in error  # torch goes on for three sentences more
    assert sorted(os.listdir()) == [path.name]


def test_places_that_cannot_be_written_and_files_that_are_not_there_are_told_in_one_line(folder, tmp_path, capsys):
    file = str(foreign.write("CION", folder))
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("x")

    def refusal(*arguments: str) -> str:
        assert main(["import", *arguments]) == 78
        return capsys.readouterr().err.splitlines()[-1]

    assert "a new folder is required." in refusal(file, str(tmp_path / "there"))
    assert "a new folder is required." in refusal(file, str(tmp_path / "file"))
    assert "file. Fix it or choose another place" in refusal(file, str(tmp_path / "file/out"))
    assert "is required" in refusal(str(tmp_path / "gone.pth"), str(tmp_path / "out"))
    assert "is required" in refusal(str(tmp_path / "there"), str(tmp_path / "out"))
    assert "--file is for a model of timm's" in refusal(file, str(tmp_path / "out"), "--file", file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("--mean 128 128 128", "--mean must be three numbers from 0 to 1. Got (128, 128, 128): divide numbers of 0 ... 255"),
        ("--mean nan 0 0", "--mean must be three numbers from 0 to 1. Got (nan, 0, 0)"),
        ("--mean -0.1 0 0", "--mean must be three numbers from 0 to 1. Got (-0.1, 0, 0)"),
        ("--std 0 1 1", "--std must be above 0 and at most 1, three numbers. Got (0, 1, 1)"),
        ("--std 1 inf 1", "--std must be above 0 and at most 1, three numbers. Got (1, inf, 1)"),
        ("--std 58 57 58", "Got (58, 57, 58): divide numbers of 0 ... 255 by 255"),
        ("--img-size 100x100", "--img-size must be multiples of 16 pixels. Got 100x100"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_is_said_to_be_found(given, reason, folder, tmp_path, capsys):
    capsys.readouterr()
    assert main(["import", str(foreign.write("CION", folder)), str(tmp_path / "out"), *given.split()]) == 78
    said = capsys.readouterr()
    assert reason in said.err.splitlines()[-1]
    assert "the encoder's" not in said.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["256", "256x", "x128", "0x128", "256*128", "256x128x3"])
def test_a_size_that_is_none_is_told_how_one_looks(given, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["import", "weights.pth", str(tmp_path / "out"), "--img-size", given])
    assert ended.value.code == 78
    assert f"must be HEIGHTxWIDTH in pixels, such as 256x128, got '{given}'" in capsys.readouterr().err
    assert arguments.size("256X128") == (256, 128)


def test_importing_needs_no_deepspeed_and_no_streaming(folder, tmp_path):
    code = "import sys; from personmae.__main__ import main; assert main() == 0; print(*{n.split('.')[0] for n in sys.modules})"
    command = [sys.executable, "-c", code, "import", str(foreign.write("CION", folder)), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[-1].split()) & {"deepspeed", "streaming", "matplotlib", "timm", "torchvision"} == set()
