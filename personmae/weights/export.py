"""A trained model for other people's tools: one folder, in which every file was loaded and compared with the checkpoint.

The folder itself is what ``personmae.load`` reads. What is beside that is for timm, transformers, ONNX runtimes and trackers,
roboflow's reid, the TransReID family, and torch.export. The folder has its name only when all checks have passed.
"""

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from personmae import dist
from personmae.errors import Incomplete, UserError
from personmae.reid import retrieval
from personmae.reid.datasets import Benchmark, load_benchmark
from personmae.reid.retrieval import Features
from personmae.reid.transforms import ImageSet, normalise
from personmae.weights import export_check, export_formats, export_onnx, flat, stored
from personmae.weights.encoder import Encoder
from personmae.weights.export_card import Scores, Written, model_card, origin, readme
from personmae.weights.export_check import LEAST_COSINE, Run, compare
from personmae.weights.flat import FlatViT
from personmae.weights.loading import load_for_command
from personmae.weights.pixels import to_pixels
from personmae.weights.staging import partial_folder, put_in_place, require_free

PLAIN: Final = ("timm", "huggingface", "reid", "transreid")  # hold a plain ViT
FORMATS: Final = ("timm", "huggingface", "onnx", "reid", "transreid", "torch_export")
PRECISIONS: Final = ("fp32", "bf16", "int8")
_NEEDED: Final = {"onnx": export_onnx.PACKAGES, "huggingface": ("transformers",)}  # packages of the extra "export"
_LEAST: Final = {"fp32": LEAST_COSINE, "bf16": 0.99, "int8": 0.9}  # below it the file is wrong, not only coarse
_BATCH: Final = 64


@dataclass(frozen=True)
class Job:
    """What is exported, where to, and the images of the checks, as each kind of file wants them."""

    encoder: Encoder
    flat: FlatViT | None  # None where no plain ViT can hold its encoder
    folder: Path  # where the files are while they are written
    home: Path  # where they will be
    precision: str
    pixels: Tensor  # uint8 (N, 3, H, W)
    images: Tensor  # normalised

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def plain(self) -> FlatViT:
        assert self.flat  # formats that need it are left out otherwise
        return self.flat

    @property
    def plain_holds(self) -> str:
        return "the whole model" if self.plain.whole else "the ViT alone"

    def of_plain(self) -> Tensor:
        """What a plain ViT must give."""
        with torch.no_grad():
            return flat.reference(self.encoder, self.plain)(self.images)

    def of_model(self) -> Tensor:
        with torch.no_grad():
            return self.encoder.model(self.images)


def run(
    where: str,
    out: Path,
    *,
    formats: Sequence[str] = FORMATS,
    precision: str = "fp32",
    benchmark: tuple[str, str] | None = None,
    unfinished: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> list[Written]:
    """Write the model at ``where`` into the folder ``out``, in the ``formats`` and the ``precision`` of their weights.

    ``benchmark`` (name, root) adds the scores of the checkpoint and of an exported file on it.

    Raises:
        UserError: there is no such model or benchmark, ``out`` exists or cannot be written to, or a package is not installed.
        Incomplete: a file does not agree with the checkpoint. ``out`` is not there then.
    """
    _require_fitting(formats, precision)
    require_free(out)
    found = load_benchmark(*benchmark, splits=("query", "gallery")) if benchmark else None
    encoder = load_for_command(where, log, device="cpu", unfinished=unfinished)
    people = export_check.drawn_people()
    pixels = torch.from_numpy(np.stack([to_pixels(image, encoder.config["size"]) for image in people]))
    images = normalise(pixels, encoder.config["mean"], encoder.config["std"])
    out = out.absolute()
    with partial_folder(out, keep=False) as staging:
        (folder := staging / "folder").mkdir()
        lacking = flat.lacks(encoder)
        job = Job(encoder, None if lacking else flat.flatten(encoder), folder, out, precision, pixels, images)
        written, left_out = [], [name for name in formats if lacking and name in PLAIN]
        if left_out:
            log(f"{', '.join(left_out)} left out: a plain ViT has not {lacking}")
        for each in _all_files(job, [name for name in formats if name not in left_out]):
            _require_agreement(each)
            log(f"{each.path}: {each.agreement}")
            written.append(each)
        scores = _scores(job, written, found, log) if found else None
        resized, nearest = export_check.resizings(encoder, people), _nearest(job.of_model())
        text = readme(encoder, job.flat, lacking, written, resized, nearest, scores, origin(encoder))
        (folder / "README.md").write_text(text, encoding="utf-8")
        put_in_place(folder, out)
        shutil.rmtree(staging)
    return written


def _require_fitting(formats: Sequence[str], precision: str) -> None:
    if unknown := [name for name in formats if name not in FORMATS]:
        raise UserError(f"--formats takes some of {', '.join(FORMATS)}. Got {unknown[0]!r}")
    if precision not in PRECISIONS:
        raise UserError(f"--precision must be one of {', '.join(PRECISIONS)}. Got {precision!r}")
    if precision == "int8" and "onnx" not in formats:
        raise UserError("--precision int8 is of ONNX files alone. Add onnx to --formats, or take bf16")
    if {"reid", "transreid"} & set(formats) and "timm" not in formats:
        raise UserError("the formats reid and transreid are built on timm's. Add timm to --formats")
    for name in formats:
        _require_packages(name)


def _require_packages(name: str) -> None:
    """Raise a UserError unless what writes and checks a format can be imported."""
    needed = _NEEDED.get(name, ())
    if absent := [package for package in needed if importlib.util.find_spec(package) is None]:
        raise UserError(
            f"the format {name} needs {', '.join(needed)}. {', '.join(absent)} cannot be imported: install "
            f"'personmae[export]', or leave {name} out with --formats"
        )


def _all_files(job: Job, formats: Sequence[str]) -> Iterator[Written]:
    """Write file after file. Each is checked before the next is begun."""
    yield _own(job)
    writers = {
        "timm": _timm,
        "huggingface": _huggingface,
        "onnx": _onnx,
        "reid": _reid,
        "transreid": _transreid,
        "torch_export": _torch_export,
    }
    for name in FORMATS:
        if name in formats:
            yield from writers[name](job)


def _require_agreement(each: Written) -> None:
    least = _LEAST[each.precision]
    if not each.agreement.least >= least:
        raise Incomplete(
            f"every image must have a cosine of at least {least} with the checkpoint. {each.path} has {each.agreement}. "
            "Nothing was written. Leave its format out with --formats"
        )


def _own(job: Job) -> Written:
    stored.write_folder(job.folder, job.encoder.stored)
    model = load_for_command(str(job.folder), lambda _: None, device="cpu").model
    with torch.no_grad():
        agreement = compare(job.of_model(), model(job.images))
    how = f'import personmae\n\nfeatures = personmae.load("{job.home.name}").features(images)'
    return Written(stored.WEIGHTS, "the whole model", how, "fp32", agreement)


def _timm(job: Job) -> Iterator[Written]:
    folder = job.folder / "timm"
    export_formats.write_timm(folder, job.plain, job.encoder.config, job.dtype)
    agreement = compare(job.of_plain(), export_check.run_timm(folder)(job.images))
    how = f'import timm\n\nmodel = timm.create_model("local-dir:{job.home.name}/timm", pretrained=True).eval()'
    yield Written("timm/", job.plain_holds, how, _stored_as(job), agreement)


def _huggingface(job: Job) -> Iterator[Written]:
    folder = job.folder / "huggingface"
    export_formats.write_transformers(folder, job.plain, job.encoder.config, job.dtype)
    agreement = compare(job.of_plain(), export_check.run_transformers(folder, job.plain)(job.images))
    (folder / "README.md").write_text(model_card(job.encoder, job.plain, agreement, origin(job.encoder)), encoding="utf-8")
    how = (
        "from transformers import ViTModel\n\n"
        f'model = ViTModel.from_pretrained("{job.home.name}/huggingface", add_pooling_layer=False).eval()'
    )
    yield Written("huggingface/", f"{job.plain_holds}, and a model card", how, _stored_as(job), agreement)


def _reid(job: Job) -> Iterator[Written]:
    folder, timm = job.folder / "reid", job.folder / "timm"
    export_formats.write_reid(folder, timm, job.home / "timm", job.plain, job.encoder.config)
    agreement = compare(job.of_plain(), export_check.run_reid(folder, timm)(job.images))
    name = job.home.name
    how = (
        "from reid import ReIDModel  # of roboflow. The configuration has the place of timm/: give it where that has moved\n\n"
        f'model = ReIDModel.from_pretrained("{name}/reid", architecture="timm:local-dir:{name}/timm")'
    )
    yield Written("reid/", f"{job.plain_holds}, by the weights of timm/", how, _stored_as(job), agreement)


def _transreid(job: Job) -> Iterator[Written]:
    path = job.folder / "transreid" / "weights.pt"
    export_formats.write_transreid(path, job.plain, job.dtype)
    agreement = compare(job.of_plain(), export_check.run_transreid(path, job.folder / "timm")(job.images))
    how = (
        "# MODEL.PRETRAIN_PATH of TransReID, TransReID-SSL, PASS and others. Their loaders resize positions by themselves\n"
        f'torch.load("{job.home.name}/transreid/weights.pt", weights_only=True)'
    )
    yield Written("transreid/weights.pt", f"{job.plain_holds}, as a flat dictionary", how, _stored_as(job), agreement)


def _onnx(job: Job) -> Iterator[Written]:
    folder = job.folder / "onnx"
    folder.mkdir()
    unit = job.pixels.float() / 255
    yield _graph(job, "unit.onnx", export_onnx.from_unit(job.encoder), unit, "for Ultralytics: RGB in 0 ... 1")
    imagenet = normalise(job.pixels, export_onnx.IMAGENET_MEAN, export_onnx.IMAGENET_STD)
    yield _graph(job, "imagenet.onnx", export_onnx.from_imagenet(job.encoder), imagenet, "for BoxMOT: normalised as ImageNet")
    export_formats.write_boxmot_metadata(folder / "imagenet.onnx", job.encoder.config["size"])


def _graph(job: Job, name: str, module: torch.nn.Module, images: Tensor, purpose: str) -> Written:
    """An ONNX file. It must give the same for a batch and for one image after the other."""
    path = job.folder / "onnx" / name
    export_onnx.write(module, job.encoder.config["size"], path)
    if job.precision == "bf16":
        export_onnx.to_bf16(path)
    elif job.precision == "int8":
        export_onnx.to_int8(path)
    ours = job.of_model()
    found = [compare(ours, export_check.run_onnx(path, one_by_one)(images)) for one_by_one in (False, True)]
    worse = min(found, key=lambda agreement: agreement.least)
    how = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{job.home.name}/onnx/{name}")'
    how += f'\n(features,) = session.run(None, {{"{export_onnx.INPUT}": images}})'
    return Written(f"onnx/{name}", f"the whole model, {purpose}", how, job.precision, worse)


def _torch_export(job: Job) -> Iterator[Written]:
    path = job.folder / "torch_export" / "model.pt2"
    export_formats.write_torch_export(path, export_onnx.exported_program(job.encoder.model, job.encoder.config["size"]))
    agreement = compare(job.of_model(), export_check.run_torch_export(path)(job.images))
    how = f'import torch\n\nmodel = torch.export.load("{job.home.name}/torch_export/model.pt2").module()'
    yield Written("torch_export/model.pt2", "the whole model, for normalised images", how, "fp32", agreement)


def _stored_as(job: Job) -> str:
    """int8 is of ONNX alone."""
    return "bf16" if job.precision == "bf16" else "fp32"


def _nearest(features: Tensor) -> float:
    """The largest cosine of two different images."""
    cosines = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T
    return cosines.fill_diagonal_(-1).max().item()


# --- on a benchmark ---


def _scores(job: Job, written: Sequence[Written], benchmark: Benchmark, log: Callable[[str], None]) -> Scores:
    """mAP of the checkpoint, and of the ONNX file that was written or else of timm's model."""
    config = job.encoder.config
    if any(each.path == "onnx/unit.onnx" for each in written):
        file, run_file, mean, std = (
            "onnx/unit.onnx",
            export_check.run_onnx(job.folder / "onnx/unit.onnx"),
            (0.0,) * 3,
            (1.0,) * 3,
        )
    elif (job.folder / "timm").is_dir() and job.plain.whole:
        file, run_file = "timm/", export_check.run_timm(job.folder / "timm")
        mean, std = config["mean"], config["std"]
    else:
        raise UserError("--benchmark compares an ONNX file, or timm's where it holds the whole model. Add onnx to --formats")
    shared: dict[str, Any] = {"img_size": config["size"], "num_threads": dist.usable_cores(), "log": log}
    whitening = job.encoder.stored.about.get("whiten")

    def measured(features: Features) -> dict[str, float]:
        if whitening:
            features = retrieval.for_each_camera(features, "whiten", **whitening)
        record = retrieval.measure(benchmark, features, **shared)
        assert record  # one process
        return record

    checkpoint = measured(_features(job.encoder.model, config["mean"], config["std"]))
    exported = measured(_features(run_file, mean, std))
    return Scores(str(checkpoint["benchmark_title"]), file, checkpoint, exported)


def _features(run_model: Run, mean: Sequence[float], std: Sequence[float]) -> Features:
    def features(images: ImageSet, _: np.ndarray) -> Tensor:
        rows = []
        with torch.no_grad():
            for start in range(0, len(images), _BATCH):
                batch = images.load(range(start, min(start + _BATCH, len(images))))
                rows.append(F.normalize(run_model(normalise(batch, mean, std)), dim=1))
        return torch.cat(rows)

    return features
