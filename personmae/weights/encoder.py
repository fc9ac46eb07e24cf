"""``personmae.load``: the encoder or ReID model of a run, a folder or a file, and the features of one's own images."""

import itertools
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from personmae import dist
from personmae.checkpoint import portable
from personmae.errors import UserError
from personmae.model.vit import VisionTransformer, build_encoder
from personmae.reid.heads import Neck, NeckPool, ReIDModel, build_head
from personmae.reid.transforms import normalise
from personmae.weights import importer, stored
from personmae.weights.blank import blank
from personmae.weights.pixels import ImageLike, one_by_one, to_pixels
from personmae.weights.stored import Stored

FROZEN_POOL: NeckPool = "rows"  # of an encoder whose file names no other: the best frozen reading in docs/results.md


class Features(nn.Module):
    """Normalised images (B, 3, H, W) to search features (B, D) in fp32, of length one: a ``ReIDModel`` as a plain module."""

    def __init__(self, network: ReIDModel):
        super().__init__()
        self.network = network

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.network.features(images)


class Encoder:
    """An encoder for use, with the preprocessing of its weights.

    ``model`` maps normalised images (B, 3, H, W) to features (B, D), fp32 and of length one. ``config`` has ``kind``: "reid"
    for a model with a head, "encoder" for one without. ``size`` is (height, width) in pixels. ``mean`` and ``std`` are on the
    scale 0 ... 1. ``feature`` is the head's kind or the pooling of tokens, ``dim`` is D, ``source`` is where the weights lie.
    ``stored`` is what was read from there.
    """

    def __init__(self, model: Features, weights: Stored, device: torch.device):
        settings, network = weights.model, model.network
        self.model, self.stored, self.device = model.to(device).eval(), weights, device
        self.config: dict[str, Any] = {
            "kind": "reid" if weights.head else "encoder",
            "size": tuple(settings["img_size"]),
            "mean": tuple(settings["mean"]),
            "std": tuple(settings["std"]),
            "feature": weights.head["kind"] if weights.head else weights.pool or FROZEN_POOL,
            "dim": network.feature_dim,
            "source": weights.where,
        }

    def preprocess(self, image: ImageLike) -> Float[Tensor, "3 H W"]:
        """An image as the network is fed with it: RGB, resized and normalised, on the CPU.

        Raises:
            UserError: it is no image, or its file cannot be read.
        """
        pixels = torch.from_numpy(to_pixels(image, self.config["size"]))
        return normalise(pixels[None], self.config["mean"], self.config["std"])[0]

    def features(self, images: ImageLike | Iterable[ImageLike], *, batch_size: int = 64) -> Float[Tensor, "B D"]:
        """A feature for each image in fp32 on the CPU, of length one. The dot product of two is their similarity.

        An image is a path, a PIL image, a uint8 array (H, W, 3), or a tensor (3, H, W). One alone gives one row. Threads
        decode and resize a batch while the network works on the one before.

        Raises:
            UserError: something is no image, or a file cannot be read.
        """
        waiting = one_by_one(images)
        rows = [torch.empty(0, self.config["dim"])]
        with ThreadPoolExecutor(dist.usable_cores()) as pool, torch.no_grad():

            def prepare() -> list[Any]:
                return [pool.submit(to_pixels, image, self.config["size"]) for image in itertools.islice(waiting, batch_size)]

            coming = prepare()
            while coming:
                ready, coming = torch.from_numpy(np.stack([pixels.result() for pixels in coming])), prepare()
                rows.append(self.model(normalise(ready.to(self.device), self.config["mean"], self.config["std"])).cpu())
        return torch.cat(rows)


def load(where: str | Path, *, device: str | torch.device | None = None, unfinished: bool = False) -> Encoder:
    """The encoder at ``where``. ``personmae.load`` is this function.

    Raises:
        UserError: there are no such weights, they are damaged, or they are not of an encoder that can be read.
        Unavailable: they cannot be read at present.
    """
    if not isinstance(where, str | Path) or not str(where):
        raise UserError(f"the path of a run, a checkpoint, a folder or a file of weights is required. Got {where!r}")
    chosen = _device(device)
    is_foreign = str(where).startswith(importer.TIMM) or Path(where).is_file()
    weights = importer.read(str(where), importer.Options()) if is_foreign else stored.read(where, unfinished=unfinished)
    _warn_of_weak_features(weights)
    return Encoder(Features(build(weights)), weights, chosen)


def _device(wanted: str | torch.device | None) -> torch.device:
    """The device that is asked for, else a GPU where there is one.

    Raises:
        UserError: it cannot be used here.
    """
    if wanted is None:
        return torch.device("cuda" if dist.use_cuda() else "cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's, for what it does not know and what is not there
        usable = (
            f"'cpu' or 'cuda', of {torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "'cpu', without a GPU"
        )
        raise UserError(f"a device that PyTorch can use here is required: {usable}. Got device={wanted!r}") from error
    return torch.device(wanted)


def build(weights: Stored) -> ReIDModel:
    """The network of stored weights, in evaluation mode. Without a head its tokens are pooled as they are.

    Raises:
        UserError: the tensors do not fit what the settings describe.
    """
    with blank():  # nothing is drawn that the weights would replace
        encoder = build_encoder(weights.model)
        head = (
            build_head(encoder, weights.about.get("num_classes", 0), **weights.head)
            if weights.head
            else frozen_head(encoder, weights)
        )
        network = ReIDModel(encoder, head)
    named = weights.tensors if weights.head else {f"encoder.{name}": tensor for name, tensor in weights.tensors.items()}
    in_fp32 = {name: stored.as_fp32(tensor) for name, tensor in named.items()}
    portable.load_strictly(network, in_fp32, weights.where, assign=True)
    return network.eval().requires_grad_(False)


def frozen_head(encoder: VisionTransformer, weights: Stored) -> Neck:
    """What pools the tokens of an encoder without a head."""
    num_rows, _ = encoder.grid(tuple(weights.model["img_size"]))
    pool = cast(NeckPool, weights.pool or FROZEN_POOL)
    return Neck(encoder, pool=pool, num_rows=num_rows, normalised=False)


def _warn_of_weak_features(weights: Stored) -> None:
    """Say what features without a head are worth, and what a loaded model leaves out of its own evaluation."""
    if weights.head is None and not weights.about.get("import", {}).get("finetuned"):
        warnings.warn(
            f"{weights.where} is pre-trained only. Its features are weak for search, since pre-training compares no two "
            "people: docs/results.md has the scores of both. Run 'personmae finetune' or 'unsupervised' with init= this run",
            stacklevel=4,
        )
    if weights.about.get("whiten"):
        warnings.warn(
            f"{weights.where} was evaluated with features whitened per camera, over a whole set of images. Features of single "
            "images are from before that",
            stacklevel=4,
        )
