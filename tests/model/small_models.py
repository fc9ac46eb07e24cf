"""Small models, batches and views, and the same in float64 numpy, for the tests of the equations."""

from typing import Any

import numpy as np
import paper_numpy as paper
import torch
from torch import Tensor, nn

from personmae.model.inputs import Draws, RegionSpec, cut_batch, draw_batch
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher

SPEC = RegionSpec(
    img_size=(128, 64),
    patch_size=16,
    mean=(0.5, 0.45, 0.4),
    std=(0.5, 0.25, 0.3),
    max_shift=32,
    crop_scale=(0.8, 1.0),
    crop_ratio=(0.375, 0.667),
    flip_prob=0.5,
    mask_kind="block",
    mask_ratio=0.75,
    min_block=4,
)
HEADS = {"encoder": 4, "pixel_decoder": 2, "feature_decoder": 2}


def a_batch(count: int = 3, spec: RegionSpec = SPEC) -> tuple[Tensor, Tensor, Draws]:
    """Canvases, the sizes of the images on them, and draws."""
    generator = torch.Generator().manual_seed(0)
    height, width = spec.canvas_size
    canvas = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    native = torch.tensor([[200, 100], [90, 41], [300, 140]]).repeat(count, 1)[:count]
    size = torch.tensor([[height, width], [90, 41], [150, 70]]).repeat(count, 1)[:count]
    return canvas, size, draw_batch(torch.arange(count) * 977 + 13, native, spec)


def a_model(**options: Any) -> PersonMAE:
    torch.manual_seed(0)
    model = PersonMAE(size="micro", **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.05)
    return model


def weights_of(module: nn.Module) -> dict[str, paper.Array]:
    return {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}


def numpy_batch(canvas: Tensor, sizes: Tensor, draws: Draws, spec: RegionSpec) -> list[dict[str, paper.Array]]:
    """Eq. (1) to (4) sample by sample."""
    batch, grid, size = [], spec.grid, spec.img_size
    mean, std = np.array(spec.mean) * 255, np.array(spec.std) * 255
    for i, (height, width) in enumerate(sizes.tolist()):
        pixels = canvas[i, :height, :width].double().numpy()
        box = paper.whole_pixels(draws.regions.boxes[i].numpy(), height, width)
        p, flip = int(draws.regions.scale[i]), bool(draws.regions.flip[i])
        s_h, s_w = draws.regions.shift[i].tolist()
        image = paper.eq1_resize(pixels, box, flip, p, size)
        region_a = paper.tokens_of((paper.eq2_slice(image, 0, 0, size) - mean) / std, spec.patch_size)
        region_b = paper.tokens_of((paper.eq2_slice(image, s_h, s_w, size) - mean) / std, spec.patch_size)
        visible = draws.ids_keep[i].numpy()
        coords_a = paper.eq4_coords(grid, 0, 0, spec.patch_size)
        sample = {"patches_a": region_a[visible], "coords_a": coords_a[visible], "patches_b": region_b}
        batch.append(sample | {"coords_b": paper.eq4_coords(grid, s_h, s_w, spec.patch_size)})
    return batch


def with_target(model: PersonMAE, spec: RegionSpec = SPEC) -> dict[str, Tensor]:
    batch = cut_batch(*a_batch(spec=spec), spec)
    return batch | {"target": Teacher(model.encoder, spec.grid)(batch["patches_b"])}


def patches(count: int = 2, length: int = 5, width: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(count, length, width, generator=torch.Generator().manual_seed(seed)) * 3 + 1
