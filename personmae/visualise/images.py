"""The sections that look at images: hidden patches predicted, where attention goes, and which patches match."""

from pathlib import Path
from typing import Final

import numpy as np

from personmae import config
from personmae.checkpoint import portable
from personmae.explain import attention as attending
from personmae.explain import correspondence as matching
from personmae.explain import sheet
from personmae.explain.reconstruction import Reconstruction
from personmae.explain.tokens import grid_of
from personmae.images import Pixels
from personmae.report import figures
from personmae.report.places import printable
from personmae.report.runs import RunFolder, pretraining_of, read_run
from personmae.visualise.section import Drawing, NotHere, Pair, Part, Shown, Subject, capital
from personmae.weights.encoder import Encoder

NUM_RECONSTRUCTIONS: Final = 6  # where the subject has no images to count by
HEIGHT: Final = 320  # of an image, in pixels

_ATTENTION: Final = (
    "Attention rollout (Abnar and Zuidema 2020). The attention of all blocks is multiplied, heads averaged and half of each "
    "token left as it is. It shows how much of a patch can reach the class token. It does not show what the model needs: what "
    "comes from a patch may be ignored later. Values between patches are interpolated, and each image has its own scale."
)
_NO_CLASS_TOKEN: Final = (
    "The search feature of this model is pooled from patches and not from the class token. So these maps show what the encoder "
    "gathers, and not what the feature is made of."
)
_MATCHES: Final = (
    "Two patches match where each is the other's nearest in its image, by the cosine of their tokens after the last block. The "
    f"{matching.MOST} most similar matches are drawn, with the same number at both ends. A token knows its place and what is "
    "around it. So patches may match because they lie at the same place, or since both show the floor. No line says why two "
    "images rank high: the search compares one feature for each image, and no patches."
)


# --- hidden patches --------------------------------------------------------------------------------------------------


def reconstructions(subject: Subject) -> Part:
    """Images of a pre-training run's shards, with the masks of its first epoch, predicted by its checkpoint.

    Raises:
        NotHere: it is no pre-training run.
        UserError: its checkpoint or its shards cannot be read.
        Unavailable: they cannot be read at present.
    """
    run, checkpoint = _pretraining_run(subject.where)
    count = len(subject.images) or NUM_RECONSTRUCTIONS
    drawn = figures.reconstruct_run(pretraining_of(run), run.directory, count, checkpoint=checkpoint)
    note = f"Images of the run's own shards, with the regions and masks of its first epoch. {figures.FOOTNOTE}"
    return Part(note, [_reconstruction(drawn, number) for number in range(len(drawn.region_a))])


def _pretraining_run(where: str) -> tuple[RunFolder, Path | None]:
    """The run that ``where`` names, and its checkpoint where that is named itself."""
    path = Path(where)
    is_checkpoint = (path / portable.MANIFEST).is_file()
    directory = path.resolve().parents[1] if is_checkpoint else path
    if not (directory / "config.yaml").is_file():
        raise NotHere(f"only a pre-training run can predict hidden patches. {where} has no config.yaml of one")
    run = read_run(directory)
    if not isinstance(run.settings, config.Pretrain):
        raise NotHere(f"only a pre-training run can predict hidden patches. {where} is {_kind_of(run)}")
    return run, path if is_checkpoint else None


def _kind_of(run: RunFolder) -> str:
    return f"a run of {type(run.settings).__name__.lower()!r}" if run.settings else "no run of this program"


def _reconstruction(drawn: Reconstruction, number: int) -> Drawing:
    images: list[Pixels] = [batch[number].numpy() for batch in drawn]
    own, visible = (_distance(image, images[2]) for image in images[3:])
    words = f"the prediction is {own:.0f} ¹ and {visible:.0f} ² grey levels of 255 away from RegionB on average"
    return Drawing(
        f"Image {number + 1}",
        f"{capital(words)}.",
        f"Image {number + 1} of the shards, five times: {', '.join(figures.REGION_WORDS)}. {capital(words)}.",
        sheet.row(images, figures.CAPTIONS),
    )


def _distance(first: Pixels, second: Pixels) -> float:
    """Mean absolute difference of two images in grey levels."""
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


# --- attention -------------------------------------------------------------------------------------------------------


def attention(subject: Subject) -> Part:
    """Rollout overlays of the subject's images.

    Raises:
        NotHere: there are no images.
    """
    if not subject.images:
        raise NotHere("there are no images to look at. Name a benchmark")
    note = _ATTENTION if _uses_class_token(subject.encoder) else f"{_ATTENTION} {_NO_CLASS_TOKEN}"
    return Part(note, [_attention(subject.encoder, shown) for shown in subject.images])


def _uses_class_token(encoder: Encoder) -> bool:
    """Whether the search feature has the class token in it. MGN's parts are of patches alone."""
    return str(getattr(encoder.model.network.head, "pool", "")).startswith("cls")


def _attention(encoder: Encoder, shown: Shown) -> Drawing:
    heat = attending.rollout(encoder, shown.pixels)
    large, name, words = sheet.scaled(shown.pixels, HEIGHT), printable(shown.name), attending.in_words(heat)
    pixels = sheet.row([large, attending.overlay(large, heat)], ["image", "attention"], height=HEIGHT)
    return Drawing(name, words, f"{name}, and the same with attention over it. {words}", pixels)


# --- matches ---------------------------------------------------------------------------------------------------------


def correspondence(subject: Subject) -> Part:
    """The best matches of the subject's pairs.

    Raises:
        NotHere: there are no pairs.
    """
    if not subject.pairs:
        raise NotHere("there are no pairs of images to match. Name a benchmark, whose queries have right and wrong answers")
    return Part(_MATCHES, [_match(subject.encoder, pair) for pair in subject.pairs])


def _match(encoder: Encoder, pair: Pair) -> Drawing:
    grid = grid_of(encoder)
    num_patches = grid.shape[0] * grid.shape[1]
    found = matching.match(encoder, pair.first.pixels, pair.second.pixels, most=num_patches)
    best = found[: matching.MOST]
    first, second = printable(pair.first.name), printable(pair.second.name)
    who = "The same person" if pair.same else "Another person"
    mean = f", the drawn ones with a mean similarity of {np.mean([one.similarity for one in best]):.2f}" if best else ""
    return Drawing(
        f"{first} and {second}",
        f"{who}. {len(found)} of {num_patches} patches match{mean}.",
        f"{first} at the left, {second} at the right. {who}. {matching.in_words(best)}",
        matching.draw(pair.first.pixels, pair.second.pixels, best, grid, height=HEIGHT),
    )
