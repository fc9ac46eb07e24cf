"""Eq. (3): masks hide exactly r * N patches; blocks against a loop over samples and proposals."""

import math

import pytest
import torch
from torch import Tensor

from personmae.model.masking import (
    MIN_ASPECT,
    NUM_PROPOSALS,
    block_mask,
    hiding_probability,
    ids_visible,
    num_hidden,
    num_hidden_of_person,
    person_mask,
    random_mask,
)
from personmae.model.regions import BLOCK_STREAM, FILL_STREAM, uniforms

GRID = (16, 8)
RATIOS = [round(0.05 * i, 2) for i in range(1, 20)]


def keys_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(seed))


def mask_of(kind: str, keys: Tensor, ratio: float = 0.75, grid: tuple[int, int] = GRID) -> Tensor:
    return block_mask(keys, grid, ratio, min_block=4) if kind == "block" else random_mask(keys, grid, ratio)


def slow_block_mask(
    proposals: list[list[float]], fill: list[float], ratio: float, min_block: int, block_ratio: float | None = None
) -> list[bool]:
    """One sample, as BEiT's loop would do it with these numbers."""
    h, w = GRID
    hidden: set[tuple[int, int]] = set()
    target = round(h * w * ratio)
    for u_area, u_aspect, u_top, u_left in proposals:
        remaining = (target if block_ratio is None else round(h * w * block_ratio)) - len(hidden)
        area = min_block + u_area * max(0, remaining - min_block)
        aspect = math.exp(math.log(MIN_ASPECT) + u_aspect * (math.log(1 / MIN_ASPECT) - math.log(MIN_ASPECT)))
        block_h, block_w = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if block_h > h or block_w > w:
            continue
        top, left = int(u_top * (h - block_h + 1)), int(u_left * (w - block_w + 1))
        new = {(y, x) for y in range(top, top + block_h) for x in range(left, left + block_w)} - hidden
        if 0 < len(new) <= remaining:
            hidden |= new
    by_number = sorted(range(h * w), key=lambda i: fill[i])
    for index in (i for i in by_number if divmod(i, w) not in hidden):
        if len(hidden) == target:
            break
        hidden.add(divmod(index, w))
    return [divmod(i, w) in hidden for i in range(h * w)]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", ["block", "random"])
def test_every_mask_hides_exactly_the_requested_share(kind, ratio):
    mask = mask_of(kind, keys_of(300), ratio)
    assert mask.shape == (300, 128)
    assert set(mask.sum(dim=1).tolist()) == {round(128 * ratio)}
    assert num_hidden(GRID, ratio) == round(128 * ratio)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75, 0.8, 0.95])
@pytest.mark.parametrize("min_block", [1, 4, 16])
def test_block_masks_equal_a_loop_over_samples_with_the_same_numbers(ratio, min_block):
    keys = keys_of(60, seed=1)
    proposals = uniforms(keys, BLOCK_STREAM, 4 * NUM_PROPOSALS).double().reshape(60, NUM_PROPOSALS, 4).tolist()
    fill = uniforms(keys, FILL_STREAM, 128).tolist()
    expected = [slow_block_mask(p, f, ratio, min_block) for p, f in zip(proposals, fill, strict=True)]
    assert block_mask(keys, GRID, ratio, min_block=min_block).tolist() == expected


@pytest.mark.parametrize("kind", ["block", "random"])
def test_a_mask_depends_on_its_key_alone(kind):
    keys = keys_of(50)
    together = mask_of(kind, keys)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mask_of(kind, keys[order]), together[order])
    assert torch.equal(torch.cat([mask_of(kind, key[None]) for key in keys]), together)
    assert len(together.unique(dim=0)) == 50


def boundary(mask: Tensor) -> float:
    """Mean number of neighbouring pairs of which one is hidden and one is not."""
    grid = mask.reshape(-1, *GRID)
    rows, columns = grid[:, 1:] != grid[:, :-1], grid[:, :, 1:] != grid[:, :, :-1]
    return (rows.sum() + columns.sum()).item() / len(grid)


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.75])
def test_blocks_have_a_much_shorter_boundary_than_random_masks(ratio):
    keys = keys_of(500)
    random_length = boundary(mask_of("random", keys, ratio))
    hidden = round(128 * ratio)
    pairs = 15 * 8 + 16 * 7
    assert random_length == pytest.approx(pairs * 2 * hidden * (128 - hidden) / (128 * 127), rel=0.03)
    assert boundary(mask_of("block", keys, ratio)) < 0.7 * random_length


def test_random_masks_hide_every_patch_equally_often_and_pairs_independently():
    mask = mask_of("random", keys_of(8000)).double()
    assert (mask.mean(0) - 0.75).abs().max() < 5 * (0.75 * 0.25 / 8000) ** 0.5
    correlation = torch.corrcoef(mask.T) - torch.eye(128)
    assert (correlation.fill_diagonal_(-1 / 127) + 1 / 127).abs().max() < 5.5 / 8000**0.5


def test_block_masks_reach_every_patch_favour_no_side_and_hide_whole_rows():
    mask = mask_of("block", keys_of(4000)).reshape(-1, *GRID)
    share = mask.float().mean(0)
    assert 0.15 < share.min() < share.max() < 0.99
    for mirrored in (share.flip(0), share.flip(1)):
        assert (share - mirrored).abs().max() < 5 * (2 * 0.25 / 4000) ** 0.5
    assert mask.all(dim=2).any(dim=1).float().mean() > 0.8  # an occluder as wide as the person; BEiT's loop has it in 87 %


def test_visible_indices_are_ascending_and_exactly_the_patches_not_hidden():
    mask = mask_of("block", keys_of(100))
    ids = ids_visible(mask, 32)
    expected = [[i for i in range(128) if not row[i]] for row in mask.tolist()]
    assert ids.tolist() == expected


@pytest.mark.parametrize("grid", [(8, 4), (4, 2), (3, 5)])
@pytest.mark.parametrize("kind", ["block", "random"])
def test_other_grids_are_hidden_exactly_too(kind, grid):
    hidden = round(grid[0] * grid[1] * 0.6)
    assert set(mask_of(kind, keys_of(100), 0.6, grid).sum(1).tolist()) == {hidden}


@pytest.mark.parametrize("ratio", [0.0, 0.003, 0.997, 1.0])
@pytest.mark.parametrize("kind", ["block", "random"])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(kind, ratio):
    hidden = round(128 * ratio)
    with pytest.raises(ValueError, match=rf"mask ratio {ratio} hides {hidden} of 128 patches"):
        mask_of(kind, keys_of(2), ratio)


def test_the_least_and_the_most_that_can_be_hidden_are_accepted():
    for kind in ("block", "random"):
        assert set(mask_of(kind, keys_of(20), 1 / 128).sum(1).tolist()) == {1}
        assert set(mask_of(kind, keys_of(20), 127 / 128).sum(1).tolist()) == {127}


# --- blocks for a part, random patches for the rest ---


@pytest.mark.parametrize("ratio", RATIOS[4:])
@pytest.mark.parametrize("kind", ["block", "person"])
@pytest.mark.parametrize("block_ratio", [0.0, 0.1, 0.2])
def test_masks_of_blocks_and_single_patches_hide_exactly_the_requested_share(kind, ratio, block_ratio):
    draw = {"block": block_mask, "person": person_mask}[kind]
    mask = draw(keys_of(100), GRID, ratio, min_block=4, block_ratio=block_ratio)
    assert set(mask.sum(dim=1).tolist()) == {num_hidden(GRID, ratio)} == {round(128 * ratio)}


@pytest.mark.parametrize("ratio", [0.3, 0.75])
def test_blocks_for_all_of_it_are_the_papers_masks_and_blocks_for_none_of_it_random_ones(ratio):
    keys = keys_of(200, seed=3)
    blocks = block_mask(keys, GRID, ratio, min_block=4, block_ratio=ratio)
    assert torch.equal(blocks, block_mask(keys, GRID, ratio, min_block=4))
    assert torch.equal(block_mask(keys, GRID, ratio, min_block=4, block_ratio=0.0), random_mask(keys, GRID, ratio))


@pytest.mark.parametrize(("ratio", "block_ratio"), [(0.75, 0.5), (0.75, 0.61), (0.5, 0.1), (0.9, 0.75)])
def test_a_part_in_blocks_equals_a_loop_that_stops_proposing_there(ratio, block_ratio):
    keys = keys_of(60, seed=1)
    proposals = uniforms(keys, BLOCK_STREAM, 4 * NUM_PROPOSALS).double().reshape(60, NUM_PROPOSALS, 4).tolist()
    fill = uniforms(keys, FILL_STREAM, 128).tolist()
    expected = [slow_block_mask(p, f, ratio, 4, block_ratio) for p, f in zip(proposals, fill, strict=True)]
    assert block_mask(keys, GRID, ratio, min_block=4, block_ratio=block_ratio).tolist() == expected


def test_the_more_is_in_blocks_the_shorter_the_boundary():
    shares = (0.0, 0.4, 0.6, 0.75)
    lengths = [boundary(block_mask(keys_of(500), GRID, 0.75, min_block=4, block_ratio=share)) for share in shares]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 0.8 * lengths[0]


# --- masks that mind the person ---


def slow_person_mask(
    proposals: list[list[float]], fill: list[float], ratio: float, grid: tuple[int, int], block_ratio: float | None = None
) -> list[bool]:
    """One sample: blocks go round from the last row to the first, and neither area may hide more than its own share."""
    h, w = grid
    beside = {8: 2, 4: 1, 5: 1}[w]  # columns at each side
    middle = {(y, x) for y in range(h) for x in range(beside, w - beside)}
    others = {(y, x) for y in range(h) for x in range(w)} - middle
    wanted = {"middle": round(ratio * len(middle)), "others": round(ratio * h * w) - round(ratio * len(middle))}
    share = 1.0 if block_ratio is None else block_ratio * h * w / round(ratio * h * w)
    in_blocks = {name: round(share * number) for name, number in wanted.items()}
    hidden: set[tuple[int, int]] = set()
    for u_area, u_aspect, u_top, u_left in proposals:
        left = {"middle": in_blocks["middle"] - len(hidden & middle), "others": in_blocks["others"] - len(hidden & others)}
        area = 4 + u_area * max(0, sum(left.values()) - 4)
        aspect = math.exp(math.log(MIN_ASPECT) * (1 - 2 * u_aspect))
        block_h, block_w = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if block_h > h or block_w > w:
            continue
        top, start = int(u_top * h), int(u_left * (w - block_w + 1))
        new = {(y % h, x) for y in range(top, top + block_h) for x in range(start, start + block_w)} - hidden
        if new and len(new & middle) <= left["middle"] and len(new & others) <= left["others"]:
            hidden |= new
    for name, area_of in (("middle", middle), ("others", others)):
        for place in sorted(area_of - hidden, key=lambda place: fill[place[0] * w + place[1]]):
            if len(hidden & area_of) < wanted[name]:
                hidden.add(place)
    return [divmod(i, w) in hidden for i in range(h * w)]


@pytest.mark.parametrize(
    ("grid", "ratio", "block_ratio"), [((16, 8), 0.75, None), ((16, 8), 0.5, 0.25), ((8, 4), 0.75, 0.6), ((6, 5), 0.6, None)]
)
def test_masks_that_mind_the_person_equal_a_loop_over_samples_with_the_same_numbers(grid, ratio, block_ratio):
    keys = keys_of(60, seed=2)
    proposals = uniforms(keys, BLOCK_STREAM, 4 * NUM_PROPOSALS).double().reshape(60, NUM_PROPOSALS, 4).tolist()
    fill = uniforms(keys, FILL_STREAM, grid[0] * grid[1]).tolist()
    expected = [slow_person_mask(p, f, ratio, grid, block_ratio) for p, f in zip(proposals, fill, strict=True)]
    assert person_mask(keys, grid, ratio, min_block=4, block_ratio=block_ratio).tolist() == expected


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_mask_hides_the_same_share_of_the_middle_columns(ratio):
    mask = person_mask(keys_of(200), GRID, ratio, min_block=4).reshape(-1, *GRID)
    assert set(mask[:, :, 2:6].sum(dim=(1, 2)).tolist()) == {num_hidden_of_person(GRID, ratio)} == {round(64 * ratio)}
    assert set(mask.sum(dim=(1, 2)).tolist()) == {round(128 * ratio)}


@pytest.mark.parametrize("ratio", [1 / 128, 2 / 128, 0.5, 126 / 128, 127 / 128])
@pytest.mark.parametrize("grid", [(16, 8), (1, 128), (128, 1), (64, 2), (42, 3)])
def test_as_few_or_as_many_as_there_can_be_are_shared_by_both_areas(grid, ratio):
    total = grid[0] * grid[1]
    mask = person_mask(keys_of(20), grid, ratio, min_block=4)
    assert set(mask.sum(dim=1).tolist()) == {round(total * ratio)}


def test_masks_that_mind_the_person_hide_all_rows_equally_often_where_blocks_hide_the_middle():
    keys = keys_of(6000)
    even = hiding_probability(person_mask(keys, GRID, 0.75, min_block=4), GRID)
    assert (even.mean(dim=1) - 0.75).abs().max() < 0.02
    assert (even[:, 2:6].mean(dim=1) - 0.75).abs().max() < 0.02
    assert even.min() > 0.6
    assert even.max() < 0.9
    blocks = hiding_probability(mask_of("block", keys), GRID)
    assert blocks[7:9, 3:5].min() > 0.95
    assert blocks[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 0.3


def test_masks_that_mind_the_person_are_blocks_all_the_same():
    keys = keys_of(500)
    length = boundary(person_mask(keys, GRID, 0.75, min_block=4))
    assert length < 0.75 * boundary(mask_of("random", keys))


def test_a_mask_that_minds_the_person_depends_on_its_key_alone():
    keys = keys_of(40)
    together = person_mask(keys, GRID, 0.75, min_block=4)
    assert torch.equal(torch.cat([person_mask(key[None], GRID, 0.75, min_block=4) for key in keys]), together)
    assert len(together.unique(dim=0)) == 40


def test_the_hiding_probability_is_the_share_of_masks_that_hide_a_patch():
    mask = torch.tensor([[True, False, False, True], [True, True, False, False]])
    assert hiding_probability(mask, (2, 2)).tolist() == [[1.0, 0.5], [0.0, 0.5]]
