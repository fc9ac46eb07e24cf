"""The floor of the pixel loss against least squares written out in numpy, and what a run says of it."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from closeness import assert_allclose
from torch import Tensor

from personmae.floor import Floor, FloorEstimate, floor_of, floor_warning, moments_of
from personmae.model.personmae import pixel_target

SHAPE = (32, 48)  # patches, pixels of three colours


def patches(count: int, seed: int = 0) -> Tensor:
    """Images with a hue of their own over noise, and something that is the same in all."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(9)
    cast = torch.randn(count, 1, 3, 1, generator=generator) * torch.rand(1, SHAPE[0], 3, 1, generator=fixed)
    same = torch.randn(1, *SHAPE, generator=fixed)
    noise = torch.randn(count, *SHAPE, generator=generator)
    return (cast.expand(-1, -1, -1, 16).flatten(2) + 0.5 * same + noise) * 0.4 + 0.1


def least_squares(target: np.ndarray) -> tuple[float, float]:
    """What both predictors leave, patch by patch and colour by colour, over what is left of the number of images."""
    count, num_patches, num_pixels = target.shape
    rest = target - target.mean(axis=0)
    hues = target.reshape(count, num_patches, 3, -1).mean(axis=3)
    mean_hue = hues.mean(axis=1)
    known = np.column_stack([mean_hue[:, :2], np.ones(count)])  # the third follows from the two others
    within = left = 0.0
    for patch in range(num_patches):
        for colour in range(3):
            pixels = target[:, patch].reshape(count, 3, -1)[:, colour]
            hue = pixels.mean(axis=1, keepdims=True)
            within += ((pixels - hue - (pixels - hue).mean(axis=0)) ** 2).sum()
            predicted = known @ np.linalg.lstsq(known, hue[:, 0], rcond=None)[0]
            left += num_pixels / 3 * ((hue[:, 0] - predicted) ** 2).sum()
    size = num_patches * num_pixels
    return (rest**2).sum() / (count - 1) / size, (within / (count - 1) + left / (count - 3)) / size


def test_both_scores_are_those_of_least_squares() -> None:
    target = pixel_target(patches(40))
    found = floor_of(moments_of(target))
    expected = least_squares(target.double().numpy())
    assert_allclose((found.position, found.hue), expected, rtol=1e-5)
    assert found.num_images == 40
    assert found.hue < 0.95 * found.position < 0.95


def test_they_are_what_new_images_would_score() -> None:
    """Estimates from few images are those from many: nothing is fitted to the images that are scored."""
    few = [floor_of(moments_of(pixel_target(patches(12, seed)))) for seed in range(30)]
    many = floor_of(moments_of(pixel_target(patches(3000, seed=99))))
    assert np.mean([floor.position for floor in few]) == pytest.approx(many.position, rel=5e-3)
    assert np.mean([floor.hue for floor in few]) == pytest.approx(many.hue, rel=1e-2)


def test_images_without_colour_leave_the_hue_nothing_to_explain() -> None:
    grey = torch.randn(50, SHAPE[0], 16, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 3)
    found = floor_of(moments_of(pixel_target(grey)))
    assert found.position == pytest.approx(found.hue, rel=1e-6)
    assert found.position == pytest.approx(1.0, abs=0.05)


def measured(batches: Sequence[Sequence[Tensor]], **options: int) -> list[Floor | None]:
    """What an estimate says after each step of some micro-batches."""
    estimate, said = FloorEstimate(None, **options), []
    for step in batches:
        for micro in step:
            estimate.add({"patches_b": micro})
        said.append(estimate.step())
    return said


def test_the_first_512_images_are_looked_at_in_whole_steps_whatever_the_micro_batches() -> None:
    images = patches(800)
    steps = images.split(200)
    said = measured([step.split(50) for step in steps], steps_left=100, global_batch_size=200)
    assert [bool(floor) for floor in said] == [False, False, True, False]
    wanted = floor_of(moments_of(pixel_target(images[:600])))
    assert said[2] is not None
    assert_allclose(said[2], wanted, rtol=1e-6)
    assert said[2].num_images == 600
    short = measured([[step] for step in steps], steps_left=2, global_batch_size=200)
    assert [bool(floor) for floor in short] == [False, True, False, False]


def test_a_target_that_a_batch_brings_along_is_taken() -> None:
    images = patches(20)
    estimate = FloorEstimate(None, steps_left=1, global_batch_size=20)
    estimate.add({"pixel_target": pixel_target(images)})
    assert estimate.step() == measured([[images]], steps_left=1, global_batch_size=20)[0]


def test_what_is_known_is_not_measured_again() -> None:
    known = Floor(0.9, 0.8, 512)
    estimate = FloorEstimate(known, steps_left=9, global_batch_size=20)
    estimate.add({})  # it is not looked into
    assert estimate.step() is None
    assert str(known) == (
        "floor of the pixel loss: 0.900 from a patch's position alone, 0.800 with the image's mean hue (512 images)"
    )


@pytest.mark.parametrize(("end", "warned"), [(0.95, True), (0.765, True), (0.755, False), (0.4, False)])
def test_a_run_that_ends_on_the_floor_is_warned_of_by_its_last_tenth(end: float, warned: bool) -> None:
    records = [{"step": i, "pixel_loss": 2.0} for i in range(27)] + [{"step": 27 + i, "pixel_loss": end} for i in range(3)]
    said = floor_warning(Floor(0.9, 0.8, 512), [*records, {"step": 30, "loss": 1.0}])
    assert bool(said) is warned
    if warned:
        assert said.startswith(f"warning: the pixel loss has ended at {end:.3f}, which is not 5% below the floor")
        assert "mask.kind=random" in said
        assert "\n" not in said


def test_a_run_without_records_is_not_judged() -> None:
    assert floor_warning(Floor(0.9, 0.8, 512), []) == ""
