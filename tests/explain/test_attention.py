"""Attention that is computed again equals what the network attends to, and rollout is the product it is said to be."""

from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_encoders import GRID, HEADS, OPTIONS, made, patches

from personmae.explain import attention
from personmae.explain.tokens import blocks_of, branch_of, embedded, grid_of, patch_tokens
from personmae.model.vit import Block

ENCODERS = [{"head": head} for head in HEADS] + list(OPTIONS.values())


def named(options: dict) -> str:
    return "-".join(f"{name} {value}" for name, value in options.items())


@pytest.mark.parametrize("options", ENCODERS, ids=named)
def test_attention_times_values_is_what_each_block_computes(options):
    encoder, image = made(**options), patches()
    blocks = [cast(Block, block) for block in blocks_of(encoder.model.network)]
    maps, tokens = attention.attention_maps(encoder, image), embedded(encoder, image)
    assert len(maps) == len(blocks) == 4
    with torch.no_grad():
        for block, weights in zip(blocks, maps, strict=True):
            normed = block.norm1(tokens)
            q, k, v = attention.heads_of(block.attn, normed)
            ours = weights @ v[0]  # (h, T, d)
            torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v)[0])
            joined = block.attn.proj(ours.transpose(0, 1).flatten(1))
            torch.testing.assert_close(joined, block.attn(normed)[0])
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:2]))
            tokens = block(tokens)


@pytest.mark.parametrize("options", ENCODERS, ids=named)
def test_the_blocks_that_are_walked_end_where_the_network_ends(options):
    encoder, image = made(**options), patches(1)
    network, tokens = encoder.model.network, embedded(encoder, image)
    branch = branch_of(network)
    with torch.no_grad():
        for block in blocks_of(network):
            tokens = block(tokens)
        tokens = (branch.norm if branch else network.encoder.norm)(tokens)
    rows, columns = grid_of(encoder).shape
    torch.testing.assert_close(tokens[0, 1 : 1 + rows * columns], patch_tokens(encoder, image))


@pytest.mark.parametrize("options", ENCODERS, ids=named)
def test_rollout_gives_each_patch_a_share(options):
    encoder = made(**options)
    heat = attention.rollout(encoder, patches(2))
    assert heat.shape == grid_of(encoder).shape
    assert heat.sum() == pytest.approx(1, abs=1e-9)
    assert (heat > 0).all()
    assert heat.std() > 1e-5


def slow_rollout(maps: list[list[list[list[float]]]], num_patches: int) -> list[float]:
    """Loops over blocks, heads and tokens, from the last block down: the other order than ``join`` takes."""
    num_tokens = len(maps[0][0])
    row = [1.0] + [0.0] * (num_tokens - 1)
    for heads in reversed(maps):
        following = [0.5 * value for value in row]
        for t, value in enumerate(row):
            for s in range(num_tokens):
                following[s] += value * 0.5 * sum(head[t][s] for head in heads) / len(heads)
        row = following
    shares = row[1 : 1 + num_patches]
    return [share / sum(shares) for share in shares]


@pytest.mark.parametrize("options", [{}, OPTIONS["registers"]], ids=named)
def test_rollout_is_what_loops_give(options):
    encoder, image = made(seed=4, **options), patches(3)
    maps = [weights.double().tolist() for weights in attention.attention_maps(encoder, image)]
    assert len(maps[0][0]) == 33 + (3 if options else 0)
    np.testing.assert_allclose(attention.rollout(encoder, image).ravel(), slow_rollout(maps, 32), rtol=1e-9)


def test_one_block_of_two_heads_by_hand():
    maps = [torch.tensor([[[0.2, 0.8], [0.5, 0.5]], [[0.4, 0.6], [0.5, 0.5]]])]
    torch.testing.assert_close(attention.join(maps), torch.tensor([[0.65, 0.35], [0.25, 0.75]], dtype=torch.float64))


def test_where_all_tokens_attend_alike_all_patches_have_one_share():
    encoder = made()
    for block in blocks_of(encoder.model.network):
        cast(Block, block).attn.qkv.weight.zero_()
    np.testing.assert_allclose(attention.rollout(encoder, patches()), np.full(GRID, 1 / 32), rtol=1e-6)


def test_where_patches_are_turned_their_shares_are_turned_with_them():
    encoder, image = made(places=False), patches(5)
    heat = attention.rollout(encoder, image)
    assert not np.allclose(heat, heat[:, ::-1])
    np.testing.assert_allclose(attention.rollout(encoder, image[:, ::-1]), heat[:, ::-1], rtol=1e-4)
    np.testing.assert_allclose(attention.rollout(encoder, image[::-1]), heat[::-1], rtol=1e-4)


def test_an_overlay_colours_the_strongest_patch_and_leaves_the_rest():
    image, heat = np.full((128, 64, 3), 128, np.uint8), np.zeros(GRID)
    heat[2, 1] = 1.0
    drawn = attention.overlay(image, heat)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    changed = np.abs(drawn.astype(int) - 128).max(axis=2)
    assert changed[2 * 16 + 8, 16 + 8] == changed.max() > 60
    assert changed[64:].max() == 0
    assert changed[:, 48:].max() == 0
    assert (image == 128).all()


def test_words_say_where_the_shares_lie():
    heat = np.zeros((6, 4))
    heat[0, 3], heat[3, 1], heat[5, 0] = 0.2, 0.5, 0.3
    assert attention.in_words(heat) == (
        "20 % of the attention lies in the upper third, 50 % in the middle and 30 % in the lower third. Of 6 x 4 patches the "
        "strongest is in row 4, column 2, with 50.0 %. Evenly spread, each would have 4.2 %."
    )


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16, 24])
def test_even_attention_has_even_thirds_for_any_number_of_rows(rows):
    np.testing.assert_allclose(attention.thirds_of(np.full((rows, 4), 0.25 / rows)), [1 / 3] * 3, atol=1e-12)
