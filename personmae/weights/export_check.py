"""Each exported file is loaded by the library it is for, and compared with the checkpoint on drawn people."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from personmae.synthetic.image import draw_shot
from personmae.synthetic.plan import SynthSettings, plan
from personmae.weights import export_onnx
from personmae.weights.encoder import Encoder
from personmae.weights.flat import FlatViT

NUM_IMAGES: Final = 32
LEAST_COSINE: Final = 0.9999  # of an fp32 file and the checkpoint, for every image
Run = Callable[[Tensor], Tensor]  # images (N, 3, H, W) to features (N, D)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Cosines of a file's features with those of the checkpoint, over the images, and the largest difference of a number."""

    mean: float
    least: float
    largest_difference: float

    def __str__(self) -> str:
        return f"cosine {self.mean:.7f} on average, {self.least:.7f} at least"


def drawn_people() -> list[UInt8[np.ndarray, "H W 3"]]:
    """Crops of different sizes, RGB: the same 32 synthetic people always."""
    settings = SynthSettings(pool_images=NUM_IMAGES, pool_identities=NUM_IMAGES)
    shots = [shot for shot in plan(settings) if shot.split == "pool"]
    return [np.ascontiguousarray(draw_shot(settings, shot)[0][..., ::-1]) for shot in shots]


def compare(ours: Float[Tensor, "N D"], theirs: Float[Tensor, "N D"]) -> Agreement:
    """Cosines row by row. A number that is not finite gives cosines of -1, which no check passes."""
    if ours.shape != theirs.shape or not theirs.isfinite().all():
        return Agreement(-1.0, -1.0, float("inf"))
    ours, theirs = F.normalize(ours.double(), dim=1), F.normalize(theirs.double(), dim=1)
    cosines = (ours * theirs).sum(dim=1)
    return Agreement(cosines.mean().item(), cosines.min().item(), (ours - theirs).abs().max().item())


def run_timm(folder: Path) -> Run:
    """timm's own model of a folder."""
    import timm

    return _in_eval(timm.create_model(f"local-dir:{folder}", pretrained=True))


def run_transformers(folder: Path, flat: FlatViT) -> Run:
    """The transformers library's own model of a folder, and the pooling that belongs to it."""
    from transformers import ViTModel

    model: Any = ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    run = _in_eval(model)

    def pooled(images: Tensor) -> Tensor:
        tokens: Any = run(images)
        return tokens.last_hidden_state[:, 0] if flat.pool == "token" else tokens.last_hidden_state[:, 1:].mean(dim=1)

    return pooled


def run_reid(folder: Path, timm_folder: Path) -> Run:
    """What roboflow's reid does: timm's architecture without weights, and weights of which all keys must match."""
    import timm
    from safetensors.torch import load_file

    model: Any = timm.create_model(f"local-dir:{timm_folder}", pretrained=False, num_classes=0)
    model.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
    return _in_eval(model)


def run_transreid(path: Path, timm_folder: Path) -> Run:
    """A plain ViT with the file's tensors. None may be missing or left over, though the family's loaders would pass over it."""
    import timm

    model: Any = timm.create_model(f"local-dir:{timm_folder}", pretrained=False, num_classes=0)
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"), strict=True)
    return _in_eval(model)


def run_torch_export(path: Path) -> Run:
    program: Any = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return program(images)

    return run


def run_onnx(path: Path, one_by_one: bool = False) -> Run:
    """onnxruntime on a whole batch, or on one image after the other, as of a frame with one person."""
    run = export_onnx.runner(path)
    return (lambda images: torch.cat([run(image[None]) for image in images])) if one_by_one else run


def _in_eval(model: Any) -> Run:
    model = model.float().eval()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images)

    return run


# --- how an image is resized ---


def resizings(encoder: Encoder, people: list[UInt8[np.ndarray, "H W 3"]]) -> dict[str, Agreement]:
    """What other ways of resizing change: the features of the same crops, shrunk or enlarged as trackers and PIL do it."""
    height, width = encoder.config["size"]
    bilinear = [cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR) for image in people]
    smoothed = [np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in people]
    ours = encoder.features(people)
    return {
        "OpenCV's bilinear, as BoxMOT and Ultralytics resize": compare(ours, encoder.features(bilinear)),
        "Pillow's bicubic, as timm, transformers and torchvision resize": compare(ours, encoder.features(smoothed)),
    }
