"""Images next to each other, below their words."""

import numpy as np
from PIL import ImageColor

from personmae.explain import sheet


def test_images_of_one_height_stand_next_to_each_other_below_their_words():
    first, second = np.full((60, 30, 3), 50, np.uint8), np.full((30, 60, 3), 90, np.uint8)
    drawn = sheet.row([first, second], ["a", "b"], height=120)
    assert drawn.dtype == np.uint8
    assert drawn.shape == (120 + sheet.LINE + 2 * sheet.GAP, 60 + 240 + 3 * sheet.GAP, 3)
    below = drawn[sheet.GAP + sheet.LINE :]
    assert (below[:120, sheet.GAP : sheet.GAP + 60] == 50).all()
    assert (below[:120, 2 * sheet.GAP + 60 : 2 * sheet.GAP + 300] == 90).all()
    above = drawn[: sheet.GAP + sheet.LINE]
    assert above.min() < 150
    assert tuple(drawn[0, 0]) == ImageColor.getrgb(sheet.PAPER)


def test_words_wider_than_their_image_have_room():
    drawn = sheet.row([np.zeros((64, 8, 3), np.uint8)], ["many words above a small image"], height=64)
    ink = (drawn[: sheet.GAP + sheet.LINE] < 200).any(axis=(0, 2)).nonzero()[0]
    assert ink[0] >= sheet.GAP - 1
    assert ink[-1] < drawn.shape[1] - sheet.GAP + 2


def test_a_scaled_image_keeps_its_shape():
    assert sheet.scaled(np.zeros((64, 32, 3), np.uint8), 200).shape == (200, 100, 3)
    assert sheet.scaled(np.zeros((900, 2, 3), np.uint8), 100).shape == (100, 1, 3)
