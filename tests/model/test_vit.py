"""The encoder against timm on the same weights, and its parts against what they are made from."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paper_numpy import sincos
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from personmae.model.personmae import PersonMAE
from personmae.model.vit import (
    SIZES,
    Block,
    VisionTransformer,
    grid_coords,
    init_weights,
    patchify,
    plain_attention,
    sample_table,
    sincos_embedding,
    take_tokens,
    unpatchify,
)

GRID = (16, 8)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder(**options) -> VisionTransformer:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"embed_dim": 64, "depth": 3, "num_heads": 4} | options
    model = VisionTransformer(**shape)
    for parameter in model.parameters():  # biases and norms that matter
        nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model


def timm_twin(model: VisionTransformer) -> TimmViT:
    dim, depth = model.embed_dim, len(model.blocks)
    twin = TimmViT(img_size=(256, 128), embed_dim=dim, depth=depth, num_heads=4, num_classes=0)
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert (missing, unexpected) == (["pos_embed"], [])
    positions = torch.cat([torch.zeros(1, dim), sincos_embedding(grid_coords(GRID), dim)])
    twin.pos_embed = nn.Parameter(positions[None])
    return twin.eval()


def test_encoder_equals_timms_on_the_same_weights_by_the_same_names():
    model, images = encoder().eval(), randn(3, 3, 256, 128)
    ours = model(patchify(images, 16), grid_coords(GRID).expand(3, -1, -1))
    torch.testing.assert_close(ours, timm_twin(model).forward_features(images), rtol=1e-5, atol=1e-5)


def test_encoding_a_subset_equals_timms_blocks_on_that_subset():
    model, images = encoder().eval(), randn(3, 3, 256, 128)
    ids = torch.stack([torch.randperm(128, generator=torch.Generator().manual_seed(i))[:32] for i in range(3)])
    twin = timm_twin(model)
    tokens = twin._pos_embed(twin.patch_embed(images))
    kept = torch.stack([torch.cat([sample[:1], sample[1:][index]]) for sample, index in zip(tokens, ids, strict=True)])
    ours = model(patchify(images, 16), grid_coords(GRID).expand(3, -1, -1), ids)
    torch.testing.assert_close(ours, twin.norm(twin.blocks(kept)), rtol=1e-5, atol=1e-5)


def test_ids_keep_gives_what_encoding_the_taken_patches_gives():
    model, patches, coords = encoder(), randn(2, 128, 768), grid_coords(GRID).expand(2, -1, -1)
    ids = torch.tensor([[0, 5, 17, 127], [1, 2, 3, 4]])
    taken = model(take_tokens(patches, ids), take_tokens(coords, ids))
    assert torch.equal(model(patches, coords, ids), taken)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_a_vit_with_heads_of_whole_width(name):
    size = SIZES[name]
    assert size["embed_dim"] % (4 * size["num_heads"]) == 0
    with torch.device("meta"):
        model, decoders = VisionTransformer(**size), PersonMAE(size=name)
    blocks = size["depth"] * (12 * size["embed_dim"] ** 2 + 13 * size["embed_dim"])
    rest = 768 * size["embed_dim"] + size["embed_dim"] + size["embed_dim"] + 2 * size["embed_dim"]
    assert sum(p.numel() for p in model.parameters()) == blocks + rest
    assert sum(p.numel() for p in decoders.encoder.parameters()) == blocks + rest


@pytest.mark.parametrize("dim", [8, 64, 384])
def test_sincos_embedding_equals_a_float64_loop_at_fractional_and_negative_coordinates(dim):
    coords = torch.tensor([[0.0, 0.0], [15.0, 7.0], [3.3125, 0.0625], [-1.5, -0.25], [19.0, 11.0]])
    expected = torch.from_numpy(sincos(coords.double().numpy(), dim)).float()
    torch.testing.assert_close(sincos_embedding(coords, dim), expected, rtol=0, atol=5e-6)


def test_positions_of_a_grid_are_all_different():
    table = sincos_embedding(grid_coords(GRID), 64)
    assert (torch.cdist(table, table) + 9 * torch.eye(128)).min() > 0.1


def test_grid_coords_run_row_by_row_with_y_first():
    coords = grid_coords((3, 2)).tolist()
    assert coords == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]


@pytest.mark.parametrize("size", [(256, 128), (32, 64), (48, 16)])
def test_unpatchify_inverts_patchify(size):
    images = randn(2, 3, *size)
    grid = (size[0] // 16, size[1] // 16)
    assert torch.equal(unpatchify(patchify(images, 16), grid, 16), images)


def test_patches_are_the_squares_of_the_image_row_by_row():
    image = torch.arange(3 * 8 * 4, dtype=torch.float32).reshape(1, 3, 8, 4)
    patches = patchify(image, 2)
    for index in range(8):
        y, x = 2 * (index // 2), 2 * (index % 2)
        assert torch.equal(patches[0, index], image[0, :, y : y + 2, x : x + 2].flatten())


def test_linear_patch_embedding_equals_the_convolution():
    model, images = encoder(), randn(2, 3, 256, 128)
    expected = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.patch_embed(patchify(images, 16)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 33, 161])
def test_plain_attention_equals_pytorchs_forward_and_backward(length):
    q, k, v, weight = (randn(2, 4, length, 16, seed=i).requires_grad_() for i in range(4))
    ours, theirs = plain_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def gradients(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(*inputs).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_recomputed_activations_give_the_same_gradients():
    model, patches, coords = encoder().train(), randn(2, 128, 768), grid_coords(GRID).expand(2, -1, -1)
    stored = gradients(model, patches, coords)
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda *_: entered.append(1))
    model.activation_checkpointing = "full"
    recomputed = gradients(model, patches, coords)
    assert len(entered) == 2  # once forward, once in the backward pass
    assert stored.keys() == recomputed.keys() == dict(model.named_parameters()).keys()
    for name, gradient in stored.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_drop_path_drops_whole_branches_keeps_the_mean_and_ends_in_eval():
    model, patches = encoder(depth=2, drop_path_rate=0.5), randn(1, 8, 768).expand(400, -1, -1)
    coords = grid_coords((4, 2)).expand(400, -1, -1)
    first, last = model.blocks
    assert isinstance(first, Block)
    assert isinstance(last, Block)
    assert (first.drop_path, last.drop_path) == (0.0, 0.5)
    with torch.no_grad():
        x = model.embed(patches, coords)
        branch = last.mlp(last.norm2(x))
        torch.manual_seed(0)
        dropped = last._dropped(branch)
        share = dropped / branch
    assert set(share[:, 0, 0].round(decimals=4).tolist()) == {0.0, 2.0}
    assert (share - share[:, :1, :1]).abs().max() < 1e-4
    assert share.mean().item() == pytest.approx(1.0, abs=0.15)
    assert last.eval()._dropped(branch) is branch


def test_init_weights_reaches_every_parameter():
    model = PersonMAE(size="micro")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    init_weights(model)
    assert [name for name, p in model.named_parameters() if not p.isfinite().all()] == []
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std() > 0, name


def test_initial_weights_have_the_documented_spread():
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES["small"])
    patch, dim = model.patch_embed.proj.weight, 384
    assert patch.abs().max().item() == pytest.approx((6 / (768 + dim)) ** 0.5, rel=1e-2)  # xavier as a linear layer
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)


def test_class_token_carries_no_position():
    model, patches = encoder(), randn(1, 4, 768)
    near, far = (model.embed(patches, c) for c in (torch.zeros(1, 4, 2), torch.full((1, 4, 2), 7.0)))
    assert torch.equal(near[:, 0], far[:, 0])
    assert torch.equal(near[0, 0], model.cls_token[0, 0])
    assert not torch.equal(near[:, 1:], far[:, 1:])


def test_encoder_does_not_care_about_the_order_of_patches():
    model = copy.deepcopy(encoder()).eval()
    patches, coords = randn(1, 32, 768), grid_coords((8, 4))[None]
    order = torch.from_numpy(np.random.default_rng(0).permutation(32))
    straight, shuffled = model(patches, coords), model(patches[:, order], coords[:, order])
    torch.testing.assert_close(shuffled[:, 1:], straight[:, 1:][:, order], rtol=1e-4, atol=1e-5)


# --- what encoders of other projects have ---


def test_a_table_equals_itself_at_its_places_and_grid_sample_between_them():
    table, coords = randn(1, 16 * 8, 6), 20 * torch.rand(50, 2, generator=torch.Generator().manual_seed(1)) - 2
    assert torch.equal(sample_table(table, GRID, grid_coords(GRID)), table[0])
    scaled = 2 * coords.flip(-1) / torch.tensor([7.0, 15.0]) - 1  # (x, y) in -1 ... 1
    maps = table.reshape(1, 16, 8, 6).permute(0, 3, 1, 2)
    expected = F.grid_sample(maps, scaled[None, None], mode="bilinear", padding_mode="border", align_corners=True)
    torch.testing.assert_close(sample_table(table, GRID, coords), expected[0, :, 0].T, rtol=1e-5, atol=1e-5)


def test_a_table_is_sampled_in_fp32_also_under_autocast():
    table, coords = randn(1, 128, 6), grid_coords(GRID) + 0.3
    with torch.autocast("cpu", torch.bfloat16):
        sampled = sample_table(table, GRID, coords)
    assert torch.equal(sampled, sample_table(table, GRID, coords))


def test_a_table_registers_and_clips_variants_equal_timms():
    options = {"table": GRID, "num_registers": 3, "pre_norm": True, "patch_bias": False, "norm_eps": 1e-5}
    model, images = encoder(**options, activation="quick_gelu").eval(), randn(3, 3, 256, 128)
    twin = TimmViT(
        img_size=(256, 128),
        embed_dim=64,
        depth=3,
        num_heads=4,
        num_classes=0,
        reg_tokens=3,
        no_embed_class=True,
        pre_norm=True,
        norm_layer="layernorm",
        act_layer="quick_gelu",
    ).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    for norm in twin.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = 1e-5
    ours = model(patchify(images, 16), grid_coords(GRID).expand(3, -1, -1))
    theirs = twin.forward_features(images)
    assert ours.shape == (3, 129, 64)
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[:, 1:], theirs[:, 4:], rtol=1e-5, atol=1e-5)


def test_overlapping_patches_equal_a_convolution_with_that_stride():
    model, images = encoder(stride=12), randn(2, 3, 64, 40)
    assert model.grid((64, 40)) == (5, 3)
    conv = F.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=12)
    torch.testing.assert_close(
        model.patch_embed(patchify(images, 16, 12)), conv.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(patchify(images[:, :, :, :32], 16, 16), patchify(images[:, :, :, :32], 16))


def test_new_options_start_near_zero_and_leave_no_weight_undrawn():
    model = VisionTransformer(**SIZES["micro"], table=GRID, num_registers=2, pre_norm=True)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    init_weights(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert {"pos_embed", "reg_token", "norm_pre.weight"} <= set(model.state_dict())
    assert set(VisionTransformer(**SIZES["micro"]).state_dict()) & {"pos_embed", "reg_token", "norm_pre.weight"} == set()
