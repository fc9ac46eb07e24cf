"""``personmae export``: every file gives what the checkpoint gives, in the library it is for. A wrong one is refused."""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_weights
import numpy as np
import pytest
import small_runs
import torch
import torch.nn.functional as F
from full_disk import full_disk
from safetensors.torch import load_file
from small_runs import personmae, refusal
from torch import Tensor

import personmae as package
from personmae.errors import Incomplete, UserError
from personmae.reid.transforms import normalise
from personmae.weights import export, export_formats, export_onnx, flat
from personmae.weights.encoder import Encoder
from personmae.weights.export_check import compare
from personmae.weights.pixels import to_pixels

HAS_ONNX = all(importlib.util.find_spec(name) for name in export_onnx.PACKAGES)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript and onnxruntime are not installed: personmae[export]")


@pytest.fixture(autouse=True)
def _signals(restore_signals: None) -> None:
    """Programs that run in this process take signals."""


@pytest.fixture(scope="module")
def crops() -> list[np.ndarray]:
    """Other people than those of the command's own check."""
    return small_runs.people(9)


def load(where: Path) -> Encoder:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("personmae.weights.encoder._warn_of_weak_features", lambda weights: None)
        return package.load(where, device="cpu")


def wanted(encoder: Encoder, crops: list[np.ndarray], *, whole: bool = True) -> Tensor:
    """The model's features of the crops, or the mean tokens of what a plain ViT holds of it."""
    if whole:
        return encoder.features(crops)
    with torch.no_grad():
        return flat.MeanToken(encoder)(normalised(encoder, crops))


def normalised(encoder: Encoder, crops: list[np.ndarray]) -> Tensor:
    return torch.stack([encoder.preprocess(crop) for crop in crops])


def agrees(ours: Tensor, theirs: Tensor) -> None:
    """All rows are alike, of crops that are not."""
    assert ours.shape == theirs.shape
    found = compare(ours, theirs)
    assert found.least >= 0.9999
    assert found.largest_difference < 1e-4
    apart = F.normalize(ours, dim=1) @ F.normalize(ours, dim=1).T
    assert apart.min() < 0.999


def timm_features(folder: Path, images: Tensor) -> Tensor:
    import timm

    with torch.no_grad():
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)


@pytest.fixture(scope="module", params=list(small_runs.WHOLE))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A kind of head, its run, and the folder that was made of it, of what needs no compiler."""
    folder = tmp_path_factory.mktemp(request.param)
    run = small_runs.make(folder / "run", request.param)
    export.run(str(run), folder / "out", formats=export.PLAIN)
    assert sorted(path.name for path in folder.iterdir()) == ["out", "run"]
    return request.param, run, folder / "out"


# --- each file, in its own library ---


def test_the_folder_is_loaded_by_personmae(exported, crops):
    _, run, out = exported
    ours, theirs = load(run), load(out)
    torch.testing.assert_close(theirs.features(crops), ours.features(crops), rtol=0, atol=0)
    assert {**theirs.config, "source": ""} == {**ours.config, "source": ""}


def test_timm_loads_its_folder(exported, crops):
    import timm

    kind, run, out = exported
    encoder = load(run)
    model: Any = timm.create_model(f"local-dir:{out / 'timm'}", pretrained=True)
    assert model.pretrained_cfg["mean"] == small_runs.MODEL["mean"]
    assert model.pretrained_cfg["std"] == small_runs.MODEL["std"]
    assert list(model.pretrained_cfg["input_size"]) == [3, *small_runs.MODEL["img_size"]]
    theirs = timm_features(out / "timm", normalised(encoder, crops))
    agrees(wanted(encoder, crops, whole=small_runs.WHOLE[kind]), theirs)


def test_transformers_loads_its_folder(exported, crops):
    from transformers import ViTImageProcessor, ViTModel

    kind, run, out = exported
    encoder = load(run)
    model: Any = ViTModel.from_pretrained(out / "huggingface", add_pooling_layer=False)
    with torch.no_grad():
        tokens = model.eval()(normalised(encoder, crops)).last_hidden_state
    theirs = tokens[:, 0] if kind == "bnneck" else tokens[:, 1:].mean(dim=1)
    agrees(wanted(encoder, crops, whole=small_runs.WHOLE[kind]), theirs)
    processor: Any = ViTImageProcessor.from_pretrained(out / "huggingface")
    already_fitting = [np.ascontiguousarray(to_pixels(crop, encoder.config["size"]).transpose(1, 2, 0)) for crop in crops]
    pixels = processor(already_fitting, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, normalised(encoder, crops), rtol=0, atol=1e-5)


def test_reid_and_transreid_hold_the_same_tensors_as_timm(exported):
    _, _, out = exported
    timm = load_file(out / "timm" / "model.safetensors")
    of_reid = load_file(out / "reid" / "weights.safetensors")
    of_transreid = torch.load(out / "transreid" / "weights.pt", weights_only=True)
    for found in (of_reid, of_transreid):
        assert set(found) == set(timm)
        assert all(torch.equal(found[name], timm[name]) for name in timm)
    h, w = (side // 16 for side in small_runs.MODEL["img_size"])
    assert timm["pos_embed"].shape == (1, 1 + h * w, 128)
    assert not timm["pos_embed"][0, 0].any()
    assert "mask_token" not in timm  # by which timm would take it for DINOv2
    config = json.loads((out / "reid" / "reid_config.json").read_text())
    assert config["architecture"] == f"timm:local-dir:{out / 'timm'}"
    assert config["preprocessing"]["mean"] == small_runs.MODEL["mean"]


@pytest.mark.slow
def test_torch_export_loads_its_file(tmp_path, crops):
    run = small_runs.make(tmp_path / "run", "mgn")
    result = personmae("export", run, tmp_path / "out", "--formats", "torch_export")
    assert result.returncode == 0, result.stderr
    assert "2 checked files are in" in result.stderr
    encoder = load(run)
    program: Any = torch.export.load(tmp_path / "out" / "torch_export" / "model.pt2").module()
    with torch.no_grad():
        theirs = [program(normalised(encoder, some)) for some in (crops[:1], crops[1:])]
    agrees(encoder.features(crops), torch.cat(theirs))


def test_the_readme_says_what_each_file_holds_and_how_far_it_agrees(exported):
    kind, _, out = exported
    text = (out / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    files = ["model.safetensors", "timm/", "huggingface/", "reid/", "transreid/weights.pt"]
    assert [row.split("`")[1] for row in rows] == files
    assert all(float(row.split("|")[5]) >= 0.9999 for row in rows)
    assert ("A plain ViT cannot hold" in text) == (not small_runs.WHOLE[kind])
    assert sum("the ViT alone" in row for row in rows) == (0 if small_runs.WHOLE[kind] else 4)


def test_the_model_card_is_of_the_runs_own_record(tmp_path):
    run = small_runs.make(tmp_path / "run", "bnneck")
    record = {"mAP": 0.123, "rank1": 0.456, "rank5": 0.5, "mINP": 0.01, "benchmark": "folder", "benchmark_title": "own data"}
    (run / "result.json").write_text(json.dumps(record))
    (run / "run.json").write_text(json.dumps({"command": "personmae finetune x.yaml", "commit": "abc123", "seed": 5}))
    (run / "config.yaml").write_text("seed: 5\n")
    export.run(str(run), tmp_path / "out", formats=["huggingface"])
    card = (tmp_path / "out" / "huggingface" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for fact in (
        "| own data | 12.3 | 45.6 | 50.0 | 1.0 |",
        "personmae finetune x.yaml",
        "abc123",
        "seed: 5",
        "started from: random",
    ):
        assert fact in card


# --- ONNX ---


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("kind", small_runs.WHOLE)
def test_onnx_takes_any_number_of_images_normalised_in_either_way(kind, tmp_path, crops):
    import onnxruntime

    run = small_runs.make(tmp_path / "run", kind)
    result = personmae("export", run, tmp_path / "out", "--formats", "onnx")
    assert result.returncode == 0, result.stderr
    encoder = load(run)
    pixels = torch.stack([torch.from_numpy(to_pixels(crop, encoder.config["size"])) for crop in crops])
    inputs = {
        "unit": pixels.float() / 255,
        "imagenet": normalise(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }
    for name, images in inputs.items():
        session = onnxruntime.InferenceSession(str(tmp_path / "out" / "onnx" / f"{name}.onnx"))
        (given,), (made,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(float)", [3, 64, 32])
        assert isinstance(given.shape[0], str)  # a dimension with a name is free
        assert made.shape[1] == encoder.config["dim"]
        rows = [np.asarray(session.run(None, {"images": part.numpy()})[0]) for part in (images[:1], images[1:3], images[3:])]
        theirs = torch.from_numpy(np.concatenate(rows))
        agrees(encoder.features(crops), theirs)
        assert theirs.norm(dim=1).tolist() == pytest.approx([1] * len(crops), abs=1e-4)
    metadata = json.loads((tmp_path / "out" / "onnx" / "imagenet.onnx.metadata.json").read_text())
    assert metadata == {"model_name": "personmae", "model_kwargs": {"img_size": [64, 32]}}


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_fewer_bits_make_smaller_files_and_their_change_is_measured(precision, tmp_path, crops):
    run = small_runs.make(tmp_path / "run", "neck")
    sizes = {}
    for each in ("fp32", precision):
        result = personmae("export", run, tmp_path / each, "--formats", "timm,onnx", "--precision", each)
        assert result.returncode == 0, result.stderr
        sizes[each] = (tmp_path / each / "onnx" / "unit.onnx").stat().st_size
    encoder, unit = load(run), torch.stack([torch.from_numpy(to_pixels(crop, (64, 32))) for crop in crops]).float() / 255
    theirs = export_onnx.runner(tmp_path / precision / "onnx" / "unit.onnx")(unit)
    change = compare(encoder.features(crops), theirs)
    assert sizes[precision] < {"bf16": 0.6, "int8": 0.5}[precision] * sizes["fp32"]
    assert 0.9 < change.least < 0.9999999
    rows = [line for line in (tmp_path / precision / "README.md").read_text().splitlines() if line.startswith("| `onnx/unit")]
    assert rows[0].split("|")[3].strip() == precision
    assert float(rows[0].split("|")[5]) == pytest.approx(change.least, abs=0.02)
    timm = load_file(tmp_path / precision / "timm" / "model.safetensors")
    assert {tensor.dtype for tensor in timm.values()} == {torch.bfloat16 if precision == "bf16" else torch.float32}


@needs_onnx
@pytest.mark.slow
def test_scores_on_a_benchmark_stand_in_the_readme(tmp_path):
    from people import draw_few_people

    run, data = small_runs.make(tmp_path / "run", "bnneck"), draw_few_people(tmp_path) / "market1501"
    arguments = ("--formats", "onnx", "--precision", "int8", "--benchmark", "market1501", data)
    result = personmae("export", run, tmp_path / "out", *arguments)
    assert result.returncode == 0, result.stderr
    evaluated = personmae("evaluate", run, "market1501", data, "--out", tmp_path / "evaluated")
    assert evaluated.returncode == 0, evaluated.stderr
    record = json.loads((tmp_path / "evaluated" / "result.json").read_text())
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| the checkpoint, fp32 | {100 * record['mAP']:.2f} | {100 * record['rank1']:.2f} |" in text
    assert "| `onnx/unit.onnx` | " in text


# --- what is wrong is refused ---


def shuffled(of: Callable[..., Any]) -> Callable[..., Any]:
    """A writer of files whose positions have their axes exchanged, as MAE's read by a network that has y first."""

    def write(path: Path, model: flat.FlatViT, *rest: Any) -> None:
        tensors = model.tensors | {"pos_embed": model.tensors["pos_embed"].unflatten(2, (2, -1)).flip(2).flatten(2)}
        of(path, dataclasses.replace(model, tensors=tensors), *rest)

    return write


@pytest.mark.parametrize("name", ["write_timm", "write_transformers"])
def test_a_file_with_wrong_positions_is_refused_and_nothing_is_left(name, tmp_path, monkeypatch):
    run = small_runs.make(tmp_path / "run", "bnneck")
    monkeypatch.setattr(export_formats, name, shuffled(getattr(export_formats, name)))
    with pytest.raises(Incomplete, match=r"must have a cosine of at least 0.9999 .* Nothing was written"):
        export.run(str(run), tmp_path / "out", formats=["timm", "huggingface"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


WRITERS = ["timm", "huggingface", "reid", "transreid", "torch_export"]


def write(name: str, folder: Path, encoder: Encoder) -> None:
    """One format of an encoder, into a folder that is not there yet."""
    plain, options = flat.flatten(encoder), (encoder.config, torch.float32)
    if name == "timm":
        export_formats.write_timm(folder, plain, *options)
    elif name == "huggingface":
        export_formats.write_transformers(folder, plain, *options)
    elif name == "reid":
        export_formats.write_reid(folder, folder.with_name("timm"), folder.with_name("timm"), plain, encoder.config)
    elif name == "transreid":
        export_formats.write_transreid(folder / "weights.pt", plain, torch.float32)
    else:
        program = torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),))
        export_formats.write_torch_export(folder / "model.pt2", program)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_the_operating_systems_error_in_every_format(name, tmp_path, monkeypatch):
    monkeypatch.setattr(export_formats, "write_json", lambda *_: None)  # the small files come first and need no library
    encoder = load(small_runs.make(tmp_path / "run", "bnneck"))
    write("timm", tmp_path / "timm", encoder)
    monkeypatch.setattr(export_formats.os, "link", refuse)  # else there is a second name and no second file
    write(name, tmp_path / "whole", encoder)
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write(name, tmp_path / "cut", encoder)


def refuse(*_: object) -> None:
    raise OSError


def test_a_full_disk_ends_an_export_in_one_line_and_leaves_nothing(tmp_path):
    """The first file of all formats is the folder's own."""
    run = small_runs.make(tmp_path / "run", "bnneck")
    with full_disk(), pytest.raises(OSError, match="File too large") as caught:
        export.run(str(run), tmp_path / "out", formats=["timm"])
    assert caught.value.filename.endswith("model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@needs_onnx
@pytest.mark.parametrize("fewer_bits", [export_onnx.to_bf16, export_onnx.to_int8])
def test_a_full_disk_is_an_error_where_an_onnx_file_gets_fewer_bits(fewer_bits, tmp_path):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xy"]
    weights = numpy_helper.from_array(np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weights])
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(whole, tmp_path / "whole.onnx")
    before = (tmp_path / "whole.onnx").read_bytes()
    with full_disk(), pytest.raises(OSError, match="File too large"):
        fewer_bits(tmp_path / "whole.onnx")
    (tmp_path / "whole.onnx").write_bytes(before)
    fewer_bits(tmp_path / "whole.onnx")
    assert (tmp_path / "whole.onnx").stat().st_size < 0.7 * len(before)


def test_numbers_that_are_not_finite_never_agree():
    ones = torch.ones(3, 4)
    assert compare(ones, torch.full((3, 4), float("nan"))).least == -1
    assert compare(ones, torch.ones(3, 5)).least == -1
    assert compare(ones, 2 * ones).least == pytest.approx(1)
    with pytest.raises(Incomplete):
        export._require_agreement(export.Written("x", "", "", "fp32", compare(ones, ones * float("inf"))))


def test_bad_input_is_one_line_and_code_78(tmp_path, capsys):
    run = small_runs.make(tmp_path / "run", "bnneck")
    (tmp_path / "file").write_text("x")
    (tmp_path / "there").mkdir()
    cases = {
        ("export", run, tmp_path / "there"): "there exists: delete it or choose another",
        ("export", run, tmp_path / "file" / "out"): "a place that can be written to is required",
        ("export", run, "/proc/out"): "a place that can be written to is required",
        ("export", tmp_path / "nothing", tmp_path / "out"): "nothing does not exist",
        ("export", tmp_path / "nothing", tmp_path / "out", "--benchmark", "csv", tmp_path / "file"): "file is a file",
        ("export", run, tmp_path / "out", "--formats", "tim"): "--formats takes some of timm,",
        ("export", run, tmp_path / "out", "--formats", "reid"): "Add timm to --formats",
        (
            "export",
            run,
            tmp_path / "out",
            "--formats",
            "timm",
            "--precision",
            "int8",
        ): "--precision int8 is of ONNX files alone",
    }
    for arguments, expected in cases.items():
        assert expected in refusal(capsys, *arguments)
    assert sorted(os.listdir(tmp_path)) == ["file", "run", "there"]


def test_a_format_whose_library_is_absent_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setitem(export._NEEDED, "onnx", ("onnx", "a_package_that_is_not_there"))
    with pytest.raises(UserError, match=r"a_package_that_is_not_there cannot be imported: install 'personmae\[export\]'"):
        export.run(str(tmp_path / "no run is read"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_is_refused_unless_it_is_asked_for(tmp_path, capsys):
    run = small_runs.make(tmp_path / "run", "bnneck", total_steps=9)
    assert "must be a finished run and is at step 3 of 9" in refusal(capsys, "export", run, tmp_path / "out")
    export.run(str(run), tmp_path / "out", formats=["timm"], unfinished=True)
    assert (tmp_path / "out" / "timm" / "model.safetensors").is_file()


def test_a_second_export_to_one_place_waits_for_the_first(tmp_path):
    from personmae.weights.staging import partial_folder

    with (
        partial_folder(tmp_path / "out", keep=False),
        pytest.raises(UserError, match="Another is at work"),
        partial_folder(tmp_path / "out", keep=False),
    ):
        pass


def test_an_encoder_that_no_plain_vit_can_be_is_written_in_the_other_formats(tmp_path):
    made = made_weights.encoder(num_registers=2).eval()
    settings = small_runs.MODEL | {"encoder": {"num_registers": 2}}
    run = made_weights.write_run(tmp_path / "run", {"student": dict(made.state_dict())}, model=settings)
    lines: list[str] = []
    export.run(str(run), tmp_path / "out", formats=["timm", "torch_export"], log=lines.append)
    assert any("timm left out: a plain ViT has not registers" in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "model.safetensors", "personmae.json", "torch_export")
    ]
    assert "a plain ViT has not registers" in (tmp_path / "out" / "README.md").read_text()


def test_learned_positions_are_written_out(tmp_path, crops):
    made = made_weights.encoder(table=(3, 4)).eval()
    settings = small_runs.MODEL | {"encoder": {"table": [3, 4]}, "trained_size": [48, 64]}
    run = made_weights.write_run(tmp_path / "run", {"student": dict(made.state_dict())}, model=settings)
    export.run(str(run), tmp_path / "out", formats=["timm"])
    encoder = load(run)
    agrees(wanted(encoder, crops, whole=False), timm_features(tmp_path / "out" / "timm", normalised(encoder, crops)))
