"""``personmae.load``: the same features as ``evaluate`` computes, from everything that may be called an image."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import made_weights
import numpy as np
import pytest
import torch
from PIL import Image

import personmae
from personmae import evaluate
from personmae.checkpoint import portable
from personmae.errors import UserError
from personmae.reid import retrieval
from personmae.reid.frozen import FrozenRows
from personmae.reid.transforms import ImageSet, read_image
from personmae.weights import stored
from personmae.weights.encoder import Encoder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def paths(images: Path) -> list[str]:
    return sorted(map(str, images.rglob("*.jp*g")))[:7]


def as_evaluated(run: Path, paths: list[str]) -> torch.Tensor:
    """Features by the code of ``personmae evaluate``."""
    path = portable.locate(run)
    model, settings = evaluate.load_model(portable.read(path), path), portable.read_state(path)["model"]
    compute = retrieval.model_features(model, mean=settings["mean"], std=settings["std"], device=torch.device("cpu"))
    with ThreadPoolExecutor(1) as pool:
        return compute(ImageSet(paths, tuple(settings["img_size"]), pool=pool), np.zeros(len(paths), int))


@pytest.mark.parametrize("kind", made_weights.HEADS)
def test_a_fine_tuned_run_gives_what_evaluate_computes(kind, tmp_path, paths):
    run, model = made_weights.finetuned(tmp_path / "run", kind)
    loaded = personmae.load(run, device="cpu")
    features = loaded.features(paths, batch_size=3)
    assert features.shape == (7, loaded.config["dim"])
    assert features.dtype == torch.float32
    assert loaded.config["kind"] == "reid"
    torch.testing.assert_close(features, as_evaluated(run, paths), rtol=1e-5, atol=1e-6)
    assert features.std(dim=0).max() > 1e-4  # images differ
    assert {name: tuple(t.shape) for name, t in loaded.model.network.state_dict().items()} == {
        name: tuple(t.shape) for name, t in model.state_dict().items()
    }


def test_a_pre_trained_run_gives_its_rows_and_says_what_they_are_worth(tmp_path, paths):
    run, encoder = made_weights.pretrained(tmp_path / "run")
    with pytest.warns(UserWarning, match="is pre-trained only. Its features are weak for search") as said:
        loaded = personmae.load(str(run), device="cpu")
    assert said[0].filename == __file__
    assert (loaded.config["kind"], loaded.config["feature"], loaded.config["dim"]) == ("encoder", "rows", 4 * 128)
    features = loaded.features(paths)
    batch = torch.stack([loaded.preprocess(path) for path in paths])
    rows = FrozenRows(encoder, (64, 32)).features(batch)
    torch.testing.assert_close(features, torch.nn.functional.normalize(rows, dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loaded.model(batch), features, rtol=1e-5, atol=1e-6)


def test_an_exported_folder_gives_the_same(tmp_path, paths):
    run, _ = made_weights.finetuned(tmp_path / "run", "mgn")
    loaded = personmae.load(run, device="cpu")
    (tmp_path / "out").mkdir()
    stored.write_folder(tmp_path / "out", loaded.stored)
    again = personmae.load(tmp_path / "out", device="cpu")
    assert torch.equal(again.features(paths), loaded.features(paths))
    assert {**again.config, "source": None} == {**loaded.config, "source": None}
    (tmp_path / "out" / stored.WEIGHTS).write_bytes((tmp_path / "out" / stored.WEIGHTS).read_bytes()[:-9])
    with pytest.raises(UserError, match=r"an exported folder needs a whole .* export it again"):
        personmae.load(tmp_path / "out")


@pytest.fixture
def loaded(tmp_path: Path) -> Encoder:
    return personmae.load(made_weights.finetuned(tmp_path / "run", "mgn")[0], device="cpu")


def test_everything_that_may_be_called_an_image_gives_the_same_feature(loaded, paths, tmp_path):
    png = tmp_path / "a.png"
    with Image.open(paths[0]) as image:
        image.save(png)  # without loss, so that all decoders agree
    expected = loaded.features([png])
    bgr = cv2.imread(str(png))
    assert bgr is not None
    array = np.ascontiguousarray(bgr[..., ::-1])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    with Image.open(png) as pil:
        ways = [str(png), pil.copy(), pil.convert("RGBA"), array, tensor, tensor.float() / 255]
    for image in ways:
        assert torch.equal(loaded.features(image), expected), type(image)
        assert torch.equal(loaded.features([image]), expected)
    assert torch.equal(loaded.features(tensor[None]), expected)
    assert torch.equal(loaded.features(array[None]), expected)
    torch.testing.assert_close(loaded.features(iter(ways[:3])), expected.expand(3, -1), rtol=1e-5, atol=1e-6)


def test_a_turned_photograph_is_turned_as_its_file_is(loaded, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert torch.equal(loaded.features(image), loaded.features(tmp_path / "a.png"))
    assert not torch.equal(loaded.features(noise), loaded.features(tmp_path / "a.png"))


def test_images_are_preprocessed_as_in_training(loaded, paths):
    pixels = read_image(paths[0], (64, 32)).astype(np.float64) / 255
    expected = (pixels - np.array([0.4, 0.5, 0.6])[:, None, None]) / np.array([0.2, 0.3, 0.4])[:, None, None]
    np.testing.assert_allclose(loaded.preprocess(paths[0]).numpy(), expected, atol=1e-5)


def test_batches_change_nothing_and_no_image_gives_no_row(loaded, paths):
    torch.testing.assert_close(
        loaded.features(paths, batch_size=1), loaded.features(paths, batch_size=99), rtol=1e-5, atol=1e-6
    )
    assert loaded.features([]).shape == (0, loaded.config["dim"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (7, "Got int"),
        ([None], "Got NoneType"),
        (np.zeros((4, 4), np.uint8), "Got ndarray of uint8, shape"),
        (np.zeros((3, 8, 4), np.uint8), r"Got ndarray of uint8, shape \(3, 8, 4\)"),
        (np.zeros((8, 4, 3), np.float32), "Got ndarray of float32"),
        (torch.zeros(8, 4, 3, dtype=torch.uint8), r"shape \(8, 4, 3\)"),
        (torch.full((3, 8, 4), 2.0), "reaches from 2 to 2: normalised images go to .model"),
        (torch.full((3, 8, 4), torch.nan), "reaches from nan"),
        (torch.zeros(3, 8, 4, dtype=torch.int64), "int64"),
        ("gone.jpg", "a file with an image is required. gone.jpg does not exist"),
        ("tests", "a file with an image is required. tests is a folder: give the files in it"),
        (Image.new("F", (4, 8)), "pixels of a known range is required. Got mode F"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(loaded, image, message):
    with pytest.raises(UserError, match=message) as caught:
        loaded.features(image)
    assert "\n" not in str(caught.value)


def test_a_run_that_is_not_finished_is_taken_only_when_asked_for(tmp_path):
    run, _ = made_weights.pretrained(tmp_path / "run", step=2)
    with pytest.raises(UserError, match=r"must be a finished run and is at step 2 of 3.* give unfinished=True, or name"):
        personmae.load(run)
    with pytest.warns(UserWarning, match="pre-trained only"):
        assert personmae.load(run, unfinished=True, device="cpu").config["dim"]
    with pytest.raises(UserError, match=r"a checkpoint or a run directory with one is required.*nothing does not exist"):
        personmae.load(tmp_path / "nothing")


@pytest.mark.parametrize("where", [None, "", 3])
def test_what_is_no_place_of_weights_is_refused(where: Any):
    with pytest.raises(UserError, match=r"the path of a run, .* is required\. Got "):
        personmae.load(where)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_cannot_be_used_is_refused_before_weights_are_read(device, tmp_path):
    with pytest.raises(UserError, match=rf"a device that PyTorch can use here is required: 'cpu'.* Got device='{device}'"):
        personmae.load(tmp_path / "nothing", device=device)


def test_damaged_weights_are_refused_and_damaged_moments_do_not_matter(tmp_path):
    run, _ = made_weights.pretrained(tmp_path / "run")
    (folder,) = portable.folders(run)
    moments = folder / "exp_avg.safetensors"
    moments.write_bytes(moments.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="pre-trained only"):
        personmae.load(folder)
    student = folder / "student.safetensors"
    student.write_bytes(student.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is damaged: student\.safetensors does not have the size"):
        personmae.load(folder)


def test_whitening_of_an_evaluation_is_told(tmp_path):
    run, _ = made_weights.finetuned(tmp_path / "run", "neck", whiten={"dim": 4, "shrinkage": 0.3})
    with pytest.warns(UserWarning, match="was evaluated with features whitened per camera"):
        personmae.load(run)


@pytest.mark.parametrize(("name", "values"), [("mean", [128, 128, 128]), ("std", [float("nan"), 1, 1]), ("std", [0.5, 0.5])])
def test_weights_whose_normalisation_cannot_be_one_are_refused(name, values, tmp_path):
    """Of a folder that somebody has edited, and of a checkpoint that an earlier version wrote."""
    run, model = made_weights.finetuned(tmp_path / "run", "neck")
    folder = tmp_path / "folder"
    folder.mkdir()
    stored.write_folder(folder, stored.read(run))
    described = json.loads((folder / stored.DESCRIPTION).read_text())
    described["model"][name] = values
    (folder / stored.DESCRIPTION).write_text(json.dumps(described))
    tensors = {"student": dict(model.encoder.state_dict())}
    earlier = made_weights.write_run(tmp_path / "earlier", tensors, model=made_weights.MODEL | {name: values})
    for where in (folder, earlier):
        with pytest.raises(UserError, match=rf"{where}.* cannot be used: its {name} must be .*three numbers"):
            personmae.load(where)
    with pytest.raises(UserError, match=rf"cannot be used: its {name} must be"):
        portable.read_encoder(earlier)  # what init= reads


ALONE = """
import sys
import personmae
assert "torch" not in sys.modules
loaded = personmae.load(sys.argv[1], device="cpu")
assert loaded.features(sys.argv[2]).shape == (1, loaded.config["dim"])
print(*{name.split(".")[0] for name in sys.modules}, *sorted(name for name in sys.modules if name == "torch._dynamo"))
"""


def test_loading_needs_no_deepspeed_no_streaming_and_no_drawing(tmp_path, paths):
    run, _ = made_weights.finetuned(tmp_path / "run", "mgn")
    command = [sys.executable, "-W", "error", "-c", ALONE, str(run), paths[0]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch._dynamo" not in done.stdout.split()  # two seconds
    unwanted = {"deepspeed", "streaming", "matplotlib", "timm", "torchvision", "sklearn", "pydantic", "boto3", "onnx"}
    assert {"torch", "personmae"} <= set(done.stdout.split())
    assert set(done.stdout.split()) & unwanted == set()
