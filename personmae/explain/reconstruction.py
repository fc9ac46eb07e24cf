"""Hidden patches predicted (Figure 3 of the paper): a pre-training run's model, and what it makes of masked images.

The model predicts normalised patches (Eq. 5, left). To show them, each needs a mean and a standard deviation from somewhere.
The target's own give its colours away. Those of the visible patches give nothing away, and the colours may be wrong.
Images are uint8 RGB (H, W, 3).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from personmae import dist
from personmae.checkpoint import portable
from personmae.errors import UserError
from personmae.images import Pixels
from personmae.model import regions
from personmae.model.inputs import Draws, RegionSpec, cut_batch
from personmae.model.personmae import PersonMAE
from personmae.model.regions import RegionDraws
from personmae.model.vit import patchify, unpatchify
from personmae.weights import stored
from personmae.weights.blank import blank
from personmae.weights.pixels import ImageLike, to_rgb

Images = UInt8[Tensor, "B H W 3"]

GREY: Final = 160  # the pixels of a hidden patch
TARGET_STATISTICS: Final = "drawn with the target's own mean and std of each patch, which gives away its colours"
VISIBLE_STATISTICS: Final = (
    "drawn with one mean and one std per image, of RegionA's visible patches: nothing of the target is used"
)
_PARTS: Final = ("encoder.", "pixel_decoder.")  # of a student, what predicts pixels
_BLOCK: Final = re.compile(r"pixel_decoder\.blocks\.(\d+)\.")
_WHOLE: Final[dict[str, Any]] = {  # of an image: no crop, no flip, no shift. The mask is the caller's
    "max_shift": 0,
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip_prob": 0.0,
    "mask_kind": "random",
    "mask_ratio": 0.75,
    "min_block": 1,
}


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model that predicts pixels, and how images are cut for it. ``where`` is its checkpoint, after ``step`` updates."""

    model: PersonMAE
    spec: RegionSpec
    where: str
    step: int

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches, the shape of a mask."""
        return self.spec.grid

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.encoder.cls_token.device


class Figure3(NamedTuple):
    """What a model saw and predicted for one image. RegionB, the target, is RegionA itself here: nothing is shifted."""

    region_a: Pixels
    masked: Pixels  # RegionA, hidden patches grey
    region_b: Pixels  # the target
    prediction: Pixels
    uses_target_statistics: bool  # whether each predicted patch was given the mean and std of the true one
    num_hidden: int
    num_patches: int

    @property
    def in_words(self) -> str:
        """What is shown, and what colours the prediction."""
        statistics = TARGET_STATISTICS if self.uses_target_statistics else VISIBLE_STATISTICS
        return f"{self.num_hidden} of {self.num_patches} patches are hidden. The prediction is {statistics}."


class Reconstruction(NamedTuple):
    """What the model saw and predicted for B images. The two predictions differ only in how they are coloured."""

    region_a: Images
    masked: Images  # RegionA, hidden patches grey
    region_b: Images  # the target
    with_target_stats: Images  # each patch with the target patch's own mean and std: that leaks its colours
    with_visible_stats: Images  # all patches with the mean and std of RegionA's visible pixels: leaks nothing


def open_pretrained(where: str | Path, *, device: str | torch.device | None = None) -> Pretrained:
    """The student of a pre-training run's newest checkpoint, or of the checkpoint that is named. It need not be finished.

    Raises:
        UserError: there is no checkpoint, it is damaged, or it has no decoder of pixels.
        Unavailable: it cannot be read at present.
    """
    _require_no_export(where)
    path = portable.locate(where, moments=False)
    student = portable.read_kind(path, "student")
    tensors = {name: stored.as_fp32(tensor) for name, tensor in student.items() if name.startswith(_PARTS)}
    if _DECODER not in tensors:
        raise UserError(_without_decoder(path))
    state = portable.read_state(path)
    with blank():
        model = PersonMAE(**_model_arguments(state, tensors))
    portable.load_strictly(model, tensors, path, assign=True)
    chosen = torch.device(device or ("cuda" if dist.use_cuda() else "cpu"))
    model = model.to(chosen).eval().requires_grad_(False)
    return Pretrained(model, RegionSpec(**_sizes(state["model"]), **_WHOLE), str(path), state["step"])


_REQUIRED: Final = "a pre-training run with its decoder is required to predict hidden patches."
_DECODER: Final = "pixel_decoder.mask_token"


def require_decoder(where: str | Path) -> None:
    """Raise a UserError where there is no checkpoint, or none with a decoder. No tensor is read, so damage is not found."""
    _require_no_export(where)
    there = [Path(where)] if (Path(where) / portable.MANIFEST).is_file() else portable.folders(where)
    if not there:
        raise UserError(f"{_REQUIRED} {where} has no checkpoint: name a run of 'personmae pretrain'")
    if not any(_may_have_decoder(path) for path in there):
        raise UserError(_without_decoder(there[0]))


def _require_no_export(where: str | Path) -> None:
    if (Path(where) / stored.DESCRIPTION).is_file():
        raise UserError(f"{_REQUIRED} {where} is an exported folder, which holds no decoder: name the run itself")


def _without_decoder(path: Path) -> str:
    return f"{_REQUIRED} {path} has no decoder of pixels: name a run of 'personmae pretrain'"


def _may_have_decoder(path: Path) -> bool:
    """Whether the decoder's name is in a file of a checkpoint. True where one is damaged, which reading it will explain."""
    names: set[str] = set()
    try:
        for file in path.glob("student*.safetensors"):
            with safe_open(file, "pt") as opened:
                names.update(opened.keys())
    except (SafetensorError, OSError):
        return True
    return _DECODER in names


def reconstruct(
    pretrained: Pretrained, image: ImageLike, mask: Bool[np.ndarray, "rows columns"], *, use_target_statistics: bool = False
) -> Figure3:
    """Hide patches of a whole image and predict all of them. In ``mask`` True means hidden.

    Any number may be hidden. Training hid a fixed share, by default three quarters: far from it predictions are worse.

    Raises:
        UserError: it is no image, or the mask has another shape, hides nothing or leaves nothing visible.
    """
    ids_keep = torch.from_numpy(_visible_patches(mask, pretrained.grid))[None]
    pixels, device = _shrunk(to_rgb(image), pretrained.spec.canvas_size), pretrained.device
    canvas, size = torch.from_numpy(pixels)[None], torch.tensor([pixels.shape[:2]])
    whole = RegionDraws(
        boxes=torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device),
        flip=torch.tensor([False], device=device),
        scale=torch.tensor([0], device=device),
        shift=torch.tensor([[0, 0]], device=device),
    )
    draws = Draws(whole, ids_keep.to(device))
    drawn = reconstruct_batch(pretrained.model, canvas.to(device), size.to(device), draws, pretrained.spec)
    return Figure3(
        region_a=drawn.region_a[0].numpy(),
        masked=drawn.masked[0].numpy(),
        region_b=drawn.region_b[0].numpy(),
        prediction=(drawn.with_target_stats if use_target_statistics else drawn.with_visible_stats)[0].numpy(),
        uses_target_statistics=use_target_statistics,
        num_hidden=int(mask.sum()),
        num_patches=mask.size,
    )


@torch.no_grad()
def reconstruct_batch(
    model: PersonMAE, canvas: UInt8[Tensor, "B Hc Wc 3"], size: Int[Tensor, "B 2"], draws: Draws, spec: RegionSpec
) -> Reconstruction:
    """Cut the regions exactly as training does, predict RegionB, and bring everything back to pixels, on the CPU."""
    batch = cut_batch(canvas, size, draws, spec)
    pred = model.predict_pixels(batch).float()
    image = regions.resize_canvas(canvas, size, draws.regions, img_size=spec.img_size, max_shift=spec.max_shift)
    region_a, region_b = regions.cut_regions(image, draws.regions.shift, spec.img_size)
    target, visible = batch["patches_b"], batch["patches_a"].flatten(1)
    own_std = (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    own = pred * own_std + target.mean(dim=-1, keepdim=True)
    from_visible = pred * visible.std(dim=1)[:, None, None] + visible.mean(dim=1)[:, None, None]
    return Reconstruction(
        region_a=_to_bytes(region_a),
        masked=hide_patches(region_a, hidden_mask(draws.ids_keep, spec.grid), spec),
        region_b=_to_bytes(region_b),
        with_target_stats=_to_bytes(_to_pixels(own, spec)),
        with_visible_stats=_to_bytes(_to_pixels(from_visible, spec)),
    )


def hidden_mask(ids_keep: Int[Tensor, "B K"], grid: tuple[int, int]) -> Bool[Tensor, "B L"]:
    """True where a patch is hidden."""
    everything = torch.ones(len(ids_keep), grid[0] * grid[1], dtype=torch.bool, device=ids_keep.device)
    return everything.scatter(1, ids_keep, False)


def hide_patches(region: Float[Tensor, "B 3 H W"], mask: Bool[Tensor, "B L"], spec: RegionSpec) -> Images:
    """Paint hidden patches grey, for pixels in [0, 255]."""
    patches = patchify(region, spec.patch_size).masked_fill(mask[..., None], GREY)
    return _to_bytes(unpatchify(patches, spec.grid, spec.patch_size))


def _model_arguments(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What builds the part of a ``PersonMAE`` that predicts pixels. The decoder's sizes are those of its tensors."""
    settings, options = state["model"], dict(state["model"].get("encoder") or {})
    if options.get("table"):
        options["table"] = tuple(options["table"])
    blocks = {match[1] for match in map(_BLOCK.match, tensors) if match}
    return {
        "size": settings["size"],
        "patch_size": settings["patch_size"],
        "decoder_depth": len(blocks),
        "pixel_dim": tensors["pixel_decoder.mask_token"].shape[-1],
        # Older checkpoints have no such key. Then there were no such positions.
        "visible_positions": bool(state.get(portable.RESUME_KEY, {}).get("decoders.visible_positions")),
        "feature_weight": 0.0,
        "encoder_options": options,
    }


def _sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and normalisation of a checkpoint's model, as a ``RegionSpec`` has them."""
    return {
        "img_size": tuple(settings["img_size"]),
        "patch_size": settings["patch_size"],
        "mean": tuple(settings["mean"]),
        "std": tuple(settings["std"]),
    }


def _visible_patches(mask: Bool[np.ndarray, "rows columns"], grid: tuple[int, int]) -> Int[np.ndarray, " K"]:
    """Ascending indices of the patches that a mask leaves visible.

    Raises:
        UserError: it has another shape or kind, or hides all or nothing.
    """
    if mask.shape != grid or mask.dtype != np.bool_:
        shape = " x ".join(map(str, mask.shape)) or "one value"
        raise UserError(
            f"a mask of {grid[0]} x {grid[1]} patches, True where hidden, is required. Got {shape} of {mask.dtype}: make it so"
        )
    visible = np.flatnonzero(~mask)
    if not 0 < len(visible) < mask.size:
        raise UserError(
            f"a mask must hide at least 1 of {mask.size} patches and leave at least 1 visible. This one hides "
            f"{mask.size - len(visible)}: change a patch"
        )
    return visible


def _shrunk(pixels: Pixels, largest: tuple[int, int]) -> Pixels:
    """An image of at most (height, width) pixels, as its own memory. The region has a shape of its own, so both may shrink."""
    height, width = (min(side, most) for side, most in zip(pixels.shape[:2], largest, strict=True))
    if (height, width) == pixels.shape[:2]:
        return np.array(pixels, order="C")
    shrunk = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=cv2.INTER_AREA)
    return shrunk.astype(np.uint8, copy=False)


def _to_pixels(patches: Float[Tensor, "B L P"], spec: RegionSpec) -> Float[Tensor, "B 3 H W"]:
    """Invert ``normalise`` and ``patchify``."""
    mean, std = (torch.tensor(values, device=patches.device)[:, None, None] * 255 for values in (spec.mean, spec.std))
    return unpatchify(patches, spec.grid, spec.patch_size) * std + mean


def _to_bytes(images: Float[Tensor, "B 3 H W"]) -> Images:
    return images.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
