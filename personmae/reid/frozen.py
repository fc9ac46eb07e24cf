"""Features of an encoder that is not trained any further."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from personmae.model.vit import VisionTransformer, patchify
from personmae.reid.rows import Columns, row_features


class FrozenRows(nn.Module):
    """A frozen encoder: images to row means of its patch tokens, for each of ``columns`` one after the other.

    The tokens are those after the final norm. The encoder is shared and not changed.
    """

    def __init__(self, encoder: VisionTransformer, img_size: tuple[int, int], columns: tuple[Columns, ...] = ("middle",)):
        super().__init__()
        self.encoder, self.columns, self.img_size = encoder, columns, img_size
        self.grid = encoder.grid(img_size)
        self.feature_dim = len(columns) * self.grid[0] * encoder.embed_dim

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Row features in fp32. Call it in evaluation mode."""
        coords = self.encoder.coords(self.img_size, images.device).expand(len(images), -1, -1)
        tokens = self.encoder(patchify(images, self.encoder.patch_size, self.encoder.stride), coords)[:, 1:]
        return torch.cat([row_features(tokens, self.grid, columns) for columns in self.columns], dim=1)
