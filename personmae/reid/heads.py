"""The encoder with a ReID head: BNNeck on pooled tokens, or MGN's three branches. Losses are elsewhere.

Shapes as in ``personmae.model``. T = 1 + L tokens, the class token first. F features.
"""

import copy
import re
from collections.abc import Collection
from typing import Any, Final, Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from personmae.errors import UserError
from personmae.model.vit import VisionTransformer, patchify, trained_size
from personmae.reid.rows import Columns, row_features

RowSplit = Literal["adaptive", "chunk"]
Pool = Literal["cls", "mean", "cls_mean"]
NeckPool = Literal["mean", "cls", "cls_mean", "rows"]
Classifier = Literal["linear", "circle", "arc"]  # the last two give cosines, to which the loss adds its margin
_INPUT: Final = tuple(f"encoder.{name}" for name in ("patch_embed.", "cls_token", "reg_token", "pos_embed", "norm_pre."))
MGN_PARTS: Final = (1, 2, 3)  # horizontal parts of each branch; one part is the whole person


class Outputs(TypedDict):
    """What training needs: class scores of every classifier, and every vector that the triplet loss sees."""

    logits: list[Tensor]
    embeddings: list[Tensor]


class BNNeck(nn.Module):
    """Pooled tokens, batch normalisation with its bias frozen, linear classifier (arXiv 1903.07071).

    The triplet loss sees the feature before the normalisation. ``pool``: the class token, the mean of the patch tokens,
    or both one after the other (2 D). ``neck_feat``: the side of the normalisation that the test feature comes from.
    """

    num_blocks = 0  # blocks taken over from the end of the encoder

    def __init__(
        self,
        encoder: VisionTransformer,
        num_classes: int,
        *,
        pool: Pool = "cls",
        neck_feat: Literal["before", "after"] = "before",
        bn_group_size: int | None = None,
        classifier: Classifier = "linear",
    ):
        super().__init__()
        self.pool: Pool = pool
        self.neck_feat = neck_feat
        self.feature_dim = pooled_dim(encoder, pool)
        self.bn = GroupedBatchNorm(self.feature_dim, bn_group_size)
        self.classifier = build_classifier(self.feature_dim, num_classes, classifier)

    def forward(self, tokens: Float[Tensor, "B T D"], grid: tuple[int, int]) -> Outputs:
        before = pooled(tokens, self.pool)
        return {"logits": [self.classifier(self.bn(before))], "embeddings": [before]}

    def features(self, tokens: Float[Tensor, "B T D"], grid: tuple[int, int]) -> Float[Tensor, "B F"]:
        before = pooled(tokens, self.pool)
        return before if self.neck_feat == "before" else self.bn(before)


class Neck(nn.Module):
    """Pooled tokens and batch normalisation with its bias frozen: the head without classes of unsupervised training.

    ``pool`` is as in BNNeck, or "rows": the means of the patch tokens of each row, from top to bottom (h D), over all columns
    or the middle ones. Rows need their number, ``num_rows``: the images are of one size. Tokens of an encoder that is frozen
    are not ``normalised``.
    """

    num_blocks = 0

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        pool: NeckPool = "mean",
        columns: Columns = "middle",
        num_rows: int | None = None,
        bn_group_size: int | None = None,
        normalised: bool = True,
    ):
        super().__init__()
        self.pool: NeckPool = pool
        self.columns: Columns = columns
        self.num_rows = num_rows
        self.feature_dim = encoder.embed_dim * (num_rows or 0) if pool == "rows" else pooled_dim(encoder, pool)
        if not self.feature_dim:
            raise ValueError("num_rows is required where the tokens are pooled by rows")
        self.bn = GroupedBatchNorm(self.feature_dim, bn_group_size) if normalised else nn.Identity()

    def forward(self, tokens: Float[Tensor, "B T D"], grid: tuple[int, int]) -> Outputs:
        return {"logits": [], "embeddings": [self.features(tokens, grid)]}

    def features(self, tokens: Float[Tensor, "B T D"], grid: tuple[int, int]) -> Float[Tensor, "B F"]:
        """After the normalisation.

        Raises:
            UserError: the images have another number of rows than the head.
        """
        if self.pool != "rows":
            return self.bn(pooled(tokens, self.pool))
        if grid[0] != self.num_rows:
            raise UserError(
                f"features of {self.num_rows} rows need images of {self.num_rows} rows of patches. These have {grid[0]}: "
                "use the img_size of the training"
            )
        return self.bn(row_features(tokens[:, 1:], grid, self.columns))


class Branch(nn.Module):
    """A copy of the encoder's last block and final norm."""

    def __init__(self, encoder: VisionTransformer):
        super().__init__()
        self.block = copy.deepcopy(encoder.blocks[-1])
        self.norm = copy.deepcopy(encoder.norm)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.norm(self.block(tokens))


class PartEmbedding(nn.Module):
    """Projection of one pooled part, batch normalisation with its bias frozen, and a classifier of its own."""

    def __init__(
        self,
        in_dim: int,
        embed_dim: int,
        num_classes: int,
        bn_group_size: int | None = None,
        classifier: Classifier = "linear",
    ):
        super().__init__()
        self.proj = nn.Linear(in_dim, embed_dim, bias=False)
        nn.init.kaiming_normal_(self.proj.weight, mode="fan_out")
        self.bn = GroupedBatchNorm(embed_dim, bn_group_size)
        self.classifier = build_classifier(embed_dim, num_classes, classifier)

    def forward(self, part: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        return self.bn(self.proj(part))


class MGN(nn.Module):
    """Multiple Granularity Network on a ViT (arXiv 1804.01438, with the weights and sizes of LUPerson's recipe).

    Three copies of the last block give three maps: b1 is pooled whole, b2 whole and in 2 parts, b3 whole and in 3.
    All is on features after batch normalisation. ``split`` cuts rows that 3 does not divide: "adaptive" into equal
    overlapping parts (16 rows: 0-5, 5-10, 10-15), "chunk" as ``torch.chunk`` does (6, 6, 4 rows).
    """

    num_blocks = 1

    def __init__(
        self,
        encoder: VisionTransformer,
        num_classes: int,
        *,
        embed_dim: int = 256,
        split: RowSplit = "adaptive",
        bn_group_size: int | None = None,
        classifier: Classifier = "linear",
    ):
        super().__init__()
        self.split: RowSplit = split
        self.branches = nn.ModuleList(Branch(encoder) for _ in MGN_PARTS)
        num_vectors = sum(1 if parts == 1 else 1 + parts for parts in MGN_PARTS)
        self.embeds = nn.ModuleList(
            PartEmbedding(encoder.embed_dim, embed_dim, num_classes, bn_group_size, classifier) for _ in range(num_vectors)
        )
        self.feature_dim = num_vectors * embed_dim

    def forward(self, tokens: Float[Tensor, "B T D"], grid: tuple[int, int]) -> Outputs:
        vectors = self.vectors(tokens, grid)
        _, _, _, b21, b22, b31, b32, b33 = vectors
        triplets = [*vectors[:3], torch.cat([b21, b22], dim=1), torch.cat([b31, b32, b33], dim=1)]
        classifiers = [embed.get_submodule("classifier") for embed in self.embeds]
        logits = [classifier(vector) for classifier, vector in zip(classifiers, vectors, strict=True)]
        return {"logits": logits, "embeddings": triplets}

    def features(self, tokens: Float[Tensor, "B T D"], grid: tuple[int, int]) -> Float[Tensor, "B F"]:
        return torch.cat(self.vectors(tokens, grid), dim=1)

    def vectors(self, tokens: Float[Tensor, "B T D"], grid: tuple[int, int]) -> list[Float[Tensor, "B F"]]:
        """The eight normalised embeddings, in the order b1, b2, b3, b21, b22, b31, b32, b33."""
        wholes, parts = [], []
        for branch, num_parts in zip(self.branches, MGN_PARTS, strict=True):
            patches = branch(tokens)[:, 1 : 1 + grid[0] * grid[1]]  # registers come behind them
            maps = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
            wholes.append(maps.mean(dim=(2, 3)))
            if num_parts > 1:
                parts += split_rows(maps, num_parts, self.split)
        return [embed(pooled) for embed, pooled in zip(self.embeds, wholes + parts, strict=True)]


class ReIDModel(nn.Module):
    """Images to class scores and embeddings for training, and to one L2-normalised feature for search.

    The encoder is copied. Blocks that the head took over are left out of the copy, with the final norm, so every
    parameter of the model is trained. ``depth`` is the number of blocks before that, as ``layer_id`` needs it.
    ``trained_size`` is the (H, W) that the encoder knows, if it does not say so itself: positions in images of another size
    are interpolated into it.
    """

    def __init__(self, encoder: VisionTransformer, head: BNNeck | MGN | Neck, *, trained_size: tuple[int, int] | None = None):
        super().__init__()
        self.encoder, self.head = copy.deepcopy(encoder), head
        self.trained_size = self.encoder.trained_size = trained_size or encoder.trained_size
        self.depth, self.feature_dim = len(encoder.blocks), head.feature_dim
        if head.num_blocks:
            self.encoder.blocks = self.encoder.blocks[: -head.num_blocks]
            self.encoder.register_module("norm", nn.Identity())
            self.encoder.keeps_registers = True

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Outputs:
        """Scores and embeddings of normalised images."""
        return self.head(*self.encode(images))

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Search features in fp32, of length one. Call it in evaluation mode."""
        return F.normalize(self.head.features(*self.encode(images)).float(), dim=1)

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B T D"], tuple[int, int]]:
        """Tokens that the head starts from, and the (h, w) of their grid."""
        b, _, height, width = images.shape
        size, stride = self.encoder.patch_size, self.encoder.stride
        if stride == size and (height % size or width % size):
            raise UserError(f"img_size=({height}, {width}) must be a multiple of patch_size={size} in both directions")
        coords = self.encoder.coords((height, width), images.device).expand(b, -1, -1)
        return self.encoder(patchify(images, size, stride), coords), self.encoder.grid((height, width))


def split_rows(maps: Float[Tensor, "B D h w"], num_parts: int, split: RowSplit) -> list[Float[Tensor, "B D"]]:
    """Mean of each of ``num_parts`` horizontal parts, from top to bottom.

    Raises:
        UserError: the map has too few rows.
    """
    chunks = maps.chunk(num_parts, dim=2)
    if len(chunks) < num_parts and (split == "chunk" or maps.shape[2] < num_parts):
        raise UserError(
            f"{maps.shape[2]} rows of patches do not give {num_parts} parts with split={split!r}. Use a taller img_size"
        )
    if split == "chunk":
        return [chunk.mean(dim=(2, 3)) for chunk in chunks]
    return list(F.adaptive_avg_pool2d(maps, (num_parts, 1)).squeeze(3).unbind(2))


def pooled(tokens: Float[Tensor, "B T D"], pool: Pool) -> Float[Tensor, "B F"]:
    """The class token, the mean of the patch tokens, or both one after the other."""
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(dim=1)
    return {"cls": cls, "mean": mean, "cls_mean": torch.cat([cls, mean], dim=1)}[pool]


def pooled_dim(encoder: VisionTransformer, pool: Pool) -> int:
    """Width of what ``pooled`` gives."""
    return encoder.embed_dim * (2 if pool == "cls_mean" else 1)


class GroupedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over groups of ``group_size`` neighbours in the batch, its bias kept at zero.

    The field's results depend on how many images a GPU normalises together. With a set size they do not depend on the number
    of GPUs. Without a size the batch is one group. The bias stays zero so that the classifier sees features centred on the
    origin. Running statistics move by the mean over the groups, so the mean of several ranks' is what one rank would have.
    """

    def __init__(self, dim: int, group_size: int | None = None):
        super().__init__(dim)
        self.group_size = group_size
        self.bias.requires_grad_(False)

    def forward(self, input: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        if not self.training:
            return super().forward(input)
        size = min(self.group_size or len(input), len(input))
        if len(input) % size:
            raise UserError(f"groups of {size} for batch normalisation must fill the batch of a rank, which is {len(input)}")
        groups = input.float().unflatten(0, (-1, size))  # (groups, size, F)
        var, mean = torch.var_mean(groups, dim=1, correction=0, keepdim=True)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        with torch.no_grad():
            unbiased = var.mean(dim=(0, 1)) * (size / max(size - 1, 1))
            sound = (mean.isfinite() & var.isfinite()).all()  # a step that is skipped must not stay in them as NaN
            for running, seen in ((self.running_mean, mean.mean(dim=(0, 1))), (self.running_var, unbiased)):
                running.lerp_(torch.where(sound, seen, running), self.momentum)
        normalised = ((groups - mean) * (var + self.eps).rsqrt()).flatten(0, 1)
        return (normalised * self.weight + self.bias).to(input.dtype)


class CosineClassifier(nn.Linear):
    """Cosines of a feature with each class's weights, in fp32: what a loss with a margin starts from."""

    def forward(self, input: Float[Tensor, "B F"]) -> Float[Tensor, "B N"]:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(F.normalize(input.float(), dim=1), F.normalize(self.weight.float(), dim=1))


def build_classifier(in_dim: int, num_classes: int, kind: Classifier) -> nn.Linear:
    """Linear layer without bias that starts near equal scores, or one that gives cosines."""
    classifier = (nn.Linear if kind == "linear" else CosineClassifier)(in_dim, num_classes, bias=False)
    nn.init.normal_(classifier.weight, std=0.001)
    return classifier


def layer_id(name: str, depth: int) -> int:
    """Place of a ``ReIDModel`` parameter in layer decay: 0 for the input, k + 1 for block k, else ``depth`` + 1.

    ``depth`` is ``ReIDModel.depth``: the encoder of an MGN model holds one block less. A copied branch block counts as
    the last block, which it is a copy of.
    """
    if name.startswith(_INPUT):
        return 0
    if match := re.match(r"encoder\.blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    if re.match(r"head\.branches\.\d+\.block\.", name):
        return depth
    return depth + 1


def build_head(
    encoder: VisionTransformer,
    num_classes: int,
    *,
    kind: Literal["mgn", "bnneck", "neck"],
    embed_dim: int = 256,
    split: RowSplit = "adaptive",
    pool: NeckPool = "cls",
    columns: Columns = "middle",
    num_rows: int | None = None,
    classifier: Classifier = "linear",
    bn_group_size: int | None = None,
) -> BNNeck | MGN | Neck:
    """The head of a configuration. ``embed_dim`` and ``split`` are MGN's, ``columns`` and ``num_rows`` the neck's."""
    if kind == "mgn":
        return MGN(encoder, num_classes, embed_dim=embed_dim, split=split, bn_group_size=bn_group_size, classifier=classifier)
    if kind == "bnneck":
        if pool == "rows":
            raise ValueError("the bnneck head pools no rows")
        return BNNeck(encoder, num_classes, pool=pool, bn_group_size=bn_group_size, classifier=classifier)
    return Neck(encoder, pool=pool, columns=columns, num_rows=num_rows, bn_group_size=bn_group_size)


def encoder_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a plain encoder out of those of a ``ReIDModel``.

    MGN has three copies of the last block and norm. Those of the branch that sees the whole person are taken.
    """
    encoder = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
    depth = 1 + max(int(match[1]) for name in encoder if (match := re.match(r"blocks\.(\d+)\.", name)))
    for name, tensor in tensors.items():
        if match := re.match(r"head\.branches\.0\.(block|norm)\.(.+)", name):
            encoder[f"blocks.{depth}.{match[2]}" if match[1] == "block" else f"norm.{match[2]}"] = tensor
    return encoder


def describe_start(model: ReIDModel, init: str, img_size: tuple[int, int]) -> str:
    """Which of a new model's tensors come from the weights ``init``, which are new, and what another image size means.

    ``img_size`` is the (H, W) in pixels that the model will see.
    """
    given = len(encoder_weights(dict(model.state_dict())))
    new = [name for name in model.head.state_dict() if not name.startswith("branches.")]
    start = f"{given} of {given} tensors of {init} match. The head starts new: {len(new)} tensors"
    if model.trained_size in (None, img_size):
        return start
    height, width = model.trained_size
    steps = " x ".join(f"{trained / own:.3g}" for trained, own in zip(model.trained_size, img_size, strict=True))
    return (
        f"{start}. It was trained at {height}x{width} and now sees {img_size[0]}x{img_size[1]}: positions are interpolated "
        f"into the {height}x{width} that it knows, so that neighbouring patches are {steps} of its steps apart"
    )


def settings_from(init: str, record: dict[str, Any], own: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """``own`` model settings, with those from ``record`` that must be the ones of the weights ``init``.

    Raises:
        UserError: architecture or patches are not those of the weights, or a normalisation is ``given`` that is not.
    """
    for key in ("size", "patch_size", *(name for name in ("mean", "std") if name in given)):
        if record[key] != own[key]:
            value = str(record[key]).replace(" ", "")
            raise UserError(
                f"model.{key}={own[key]} must be that of {init}, which is {record[key]}. Give model.{key}={value}"
                + (" or leave it out" if key in ("mean", "std") else "")
            )
    kept = {name: record[name] for name in ("encoder", "trained_stride") if record.get(name)}
    return own | {"mean": record["mean"], "std": record["std"], "trained_size": list(trained_size(record))} | kept
