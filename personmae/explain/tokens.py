"""Where the patches of an image lie, and the tokens that an encoder of ``personmae.load`` makes of them."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from personmae.model.vit import VisionTransformer, patchify
from personmae.reid.heads import MGN, Branch, ReIDModel
from personmae.weights.encoder import Encoder
from personmae.weights.pixels import ImageLike


class PatchGrid(NamedTuple):
    """How an encoder cuts images: ``shape`` is (rows, columns) of patches.

    It sees (H, W) = ``img_size`` pixels, and a patch begins at each ``stride`` of them.
    """

    shape: tuple[int, int]
    img_size: tuple[int, int]
    patch_size: int
    stride: int

    def centre(self, patch: tuple[int, int]) -> tuple[float, float]:
        """The middle of the patch at (row, column) as (y, x), shares of an image's height and width in (0, 1)."""
        y, x = ((place * self.stride + self.patch_size / 2) / side for place, side in zip(patch, self.img_size, strict=True))
        return y, x


def grid_of(encoder: Encoder) -> PatchGrid:
    """How an encoder cuts the images that it is given."""
    network, img_size = encoder.model.network.encoder, encoder.config["size"]
    return PatchGrid(network.grid(img_size), img_size, network.patch_size, network.stride)


def blocks_of(network: ReIDModel) -> list[nn.Module]:
    """The blocks that an image passes, first to last. Of MGN's three copies of the last one, that of the whole person."""
    branch = branch_of(network)
    return [*network.encoder.blocks, *([branch.block] if branch else [])]


def branch_of(network: ReIDModel) -> Branch | None:
    """The last block and norm where MGN took them over: its branch b1, which pools the whole person. Else None."""
    branch = network.head.branches[0] if isinstance(network.head, MGN) else None
    assert branch is None or isinstance(branch, Branch)
    return branch


@torch.no_grad()
def patch_tokens(encoder: Encoder, image: ImageLike) -> Float[Tensor, "L D"]:
    """The patch tokens of one image after the last block and its norm, row by row, in fp32 on the CPU.

    Raises:
        UserError: it is no image, or its file cannot be read.
    """
    network = encoder.model.network
    tokens, (rows, columns) = network.encode(encoder.preprocess(image)[None].to(encoder.device))
    if branch := branch_of(network):
        tokens = branch(tokens)
    return tokens[0, 1 : 1 + rows * columns].float().cpu()


@torch.no_grad()
def embedded(encoder: Encoder, image: ImageLike) -> Float[Tensor, "1 T D"]:
    """All tokens of one image before the first block: the class token, the patches, then registers.

    Raises:
        UserError: it is no image, or its file cannot be read.
    """
    network: VisionTransformer = encoder.model.network.encoder
    images = encoder.preprocess(image)[None].to(encoder.device)
    coords = network.coords(encoder.config["size"], encoder.device)[None]
    return network.embed(patchify(images, network.patch_size, network.stride), coords)
