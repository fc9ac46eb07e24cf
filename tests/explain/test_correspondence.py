"""Mutual nearest neighbours between patches: the true places where they are known, and the same as a loop finds."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_encoders import GRID, HEADS, OPTIONS, SIZE, made, patches
from PIL import Image, ImageColor

from personmae.errors import UserError
from personmae.explain import correspondence
from personmae.explain.correspondence import COLOURS, Match, mutual_neighbours
from personmae.explain.tokens import PatchGrid, grid_of, patch_tokens
from personmae.model.vit import patchify
from personmae.reid.heads import MGN

ALL = 10_000
PLAIN = PatchGrid(GRID, SIZE, 16, 16)


def slow_neighbours(first: torch.Tensor, second: torch.Tensor) -> list[tuple[int, int, float]]:
    """Every pair looked at, one by one."""

    def cosine(i: int, j: int) -> float:
        a, b = first[i].double(), second[j].double()
        return float((a / a.norm()) @ (b / b.norm()))

    found = []
    for i in range(len(first)):
        j = max(range(len(second)), key=lambda j: cosine(i, j))
        if max(range(len(first)), key=lambda k: cosine(k, j)) == i:
            found.append((i, j, cosine(i, j)))
    return sorted(found, key=lambda pair: -pair[2])


def test_the_product_of_all_tokens_finds_what_a_loop_finds():
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(23, 8, generator=generator), torch.randn(31, 8, generator=generator)
    found, expected = mutual_neighbours(first, second), slow_neighbours(first, second)
    assert [pair[:2] for pair in found] == [pair[:2] for pair in expected]
    assert 5 < len(found) < 23
    np.testing.assert_allclose([pair[2] for pair in found], [pair[2] for pair in expected], rtol=0, atol=1e-12)


def test_of_equally_near_tokens_the_first_counts():
    tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    assert [pair[:2] for pair in mutual_neighbours(tokens, tokens)] == [(0, 0), (1, 1)]


@pytest.mark.parametrize("head", HEADS)
def test_an_image_matches_itself_in_every_patch(head):
    encoder, image = made(head), patches()
    found = correspondence.match(encoder, image, image, most=ALL)
    assert {one.first for one in found} == {(y, x) for y in range(8) for x in range(4)}
    assert all(one.first == one.second for one in found)
    assert all(one.similarity == pytest.approx(1, abs=1e-9) for one in found)


@pytest.mark.parametrize("options", OPTIONS)
def test_encoders_of_other_projects_match_too(options):
    encoder, image = made(**OPTIONS[options]), patches(4)
    rows, columns = grid_of(encoder).shape
    found = correspondence.match(encoder, image, image, most=ALL)
    assert [one.first for one in found] == [one.second for one in found]
    assert {one.first for one in found} == {(y, x) for y in range(rows) for x in range(columns)}


@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize("head", ["none", "mgn"])
def test_a_mirrored_and_a_moved_copy_match_to_the_true_places(head, places):
    """Tokens that know no place are the same wherever their patch is. With places, what is in a patch outweighs them here."""
    encoder, image = made(head, places=places), patches(1)
    mirrored = correspondence.match(encoder, image, image[:, ::-1], most=ALL)
    assert len(mirrored) == 32
    assert all(one.second == (one.first[0], 3 - one.first[1]) for one in mirrored)
    moved = correspondence.match(encoder, image, np.roll(image, (3 * 16, 16), (0, 1)), most=ALL)
    assert len(moved) == 32
    assert all(one.second == ((one.first[0] + 3) % 8, (one.first[1] + 1) % 4) for one in moved)
    assert (min(one.similarity for one in moved) > 1 - 1e-5) is not places


def test_the_best_matches_come_first_and_no_more_than_asked_for():
    encoder, first, second = made(), patches(5), patches(6)
    everything = correspondence.match(encoder, first, second, most=ALL)
    values = [one.similarity for one in everything]
    assert len(values) > 3
    assert values == sorted(values, reverse=True)
    assert correspondence.match(encoder, first, second, most=3) == everything[:3]
    assert len(correspondence.match(encoder, first, first)) == correspondence.MOST


def test_tokens_are_those_of_the_whole_network():
    """Without a head they are the encoder's own after its norm. With MGN they are what its first branch pools."""
    image = patches(7)
    plain, mgn = made(), made("mgn")
    network = plain.model.network.encoder
    batch = plain.preprocess(image)[None]
    with torch.no_grad():
        expected = network(patchify(batch, 16), network.coords(SIZE)[None])[0, 1:]
        head = mgn.model.network.head
        assert isinstance(head, MGN)
        pooled = head.vectors(*mgn.model.network.encode(mgn.preprocess(image)[None]))[0]
        ours = next(iter(head.embeds))(patch_tokens(mgn, image).mean(dim=0)[None])
    assert torch.equal(patch_tokens(plain, image), expected)
    torch.testing.assert_close(ours, pooled)


def test_images_of_any_size_and_kind_are_taken(tmp_path):
    encoder, image = made(), patches(8)
    large = cv2.resize(image, (301, 477))
    Image.fromarray(large).save(tmp_path / "a.png")
    from_file = correspondence.match(encoder, tmp_path / "a.png", Image.fromarray(image))
    assert from_file == correspondence.match(encoder, large, image)
    with pytest.raises(UserError, match="an image is a path"):
        correspondence.match(encoder, image, image.astype(float))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("stride", [16, 12])
def test_the_middle_of_a_patch_is_where_its_pixels_are(stride):
    grid = grid_of(made(stride=stride))
    image = torch.arange(3 * SIZE[0] * SIZE[1]).reshape(1, 3, *SIZE)
    cut = patchify(image, 16, stride)[0].reshape(*grid.shape, 3, 16, 16)
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            y, x = grid.centre((row, column))
            top, left = round(y * SIZE[0]) - 8, round(x * SIZE[1]) - 8
            assert torch.equal(cut[row, column], image[0, :, top : top + 16, left : left + 16])


def test_a_picture_has_a_dot_of_its_colour_at_both_ends_and_the_best_match_on_top():
    first, second = np.full((128, 64, 3), 200, np.uint8), np.full((64, 32, 3), 100, np.uint8)
    matches = [Match((0, 0), (7, 3), 0.9), Match((7, 0), (0, 3), 0.8)]
    drawn = correspondence.draw(first, second, matches, PLAIN, height=256)
    assert drawn.shape == (256, 128 + 42 + 128, 3)
    assert drawn.dtype == np.uint8
    assert tuple(drawn[130, 5]) == (200, 200, 200)
    assert tuple(drawn[130, 290]) == (100, 100, 100)
    for number, one in enumerate(matches):
        for (row, column), left in ((one.first, 0), (one.second, 170)):
            y, x = 32 * row + 16, left + 32 * column + 16
            around = drawn[y - 5 : y + 6, x - 5 : x + 6].reshape(-1, 3).astype(int)
            assert (np.abs(around - ImageColor.getrgb(COLOURS[number])).max(axis=1) <= 2).any()
            assert (around > 200).all(axis=1).any()  # its number
    middle = drawn[124:132, 145:153].reshape(-1, 3).astype(int)  # where both lines cross
    assert (np.abs(middle - ImageColor.getrgb(COLOURS[0])).max(axis=1) <= 8).any()


def test_numbers_can_be_read_on_their_dots():
    """WCAG asks for 4.5 to 1."""

    def luminance(colour: str) -> float:
        parts = np.array(ImageColor.getrgb(colour)[:3]) / 255
        return float(np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    assert len(set(COLOURS)) == correspondence.MOST
    assert all(1.05 / (luminance(colour) + 0.05) >= 4.5 for colour in COLOURS)


def test_words_say_what_the_picture_shows():
    matches = [Match((0, 1), (2, 3), 0.912), Match((4, 0), (4, 1), 0.5)]
    assert correspondence.in_words(matches) == (
        "2 matched patches, the most similar first. 1: row 1, column 2 and row 3, column 4 (0.91). "
        "2: row 5, column 1 and row 5, column 2 (0.50)."
    )
    assert "No two patches" in correspondence.in_words([])


def test_similarity_is_the_cosine_of_the_tokens():
    encoder, first, second = made(seed=2), patches(9), patches(10)
    for one in correspondence.match(encoder, first, second):
        ours = patch_tokens(encoder, first)[one.first[0] * 4 + one.first[1]]
        theirs = patch_tokens(encoder, second)[one.second[0] * 4 + one.second[1]]
        assert one.similarity == pytest.approx(float(F.cosine_similarity(ours, theirs, dim=0)), abs=1e-5)
