"""BNNeck and MGN on a small encoder, at 16 x 8 and 8 x 4 patches."""

import pytest
import torch
from torch import nn

from personmae.errors import UserError
from personmae.model.vit import VisionTransformer, grid_coords, patchify, share_drop_path
from personmae.reid.heads import (
    MGN,
    BNNeck,
    Branch,
    GroupedBatchNorm,
    Neck,
    PartEmbedding,
    ReIDModel,
    build_head,
    describe_start,
    encoder_weights,
    layer_id,
    settings_from,
    split_rows,
)
from personmae.reid.losses import reid_loss

DEPTH, DIM, NUM_CLASSES = 3, 32, 7


def encoder(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(embed_dim=DIM, depth=DEPTH, num_heads=2)


def mgn(seed: int = 0) -> ReIDModel:
    base = encoder(seed)
    return ReIDModel(base, MGN(base, NUM_CLASSES, embed_dim=16))


def bnneck(seed: int = 0, **options) -> ReIDModel:
    base = encoder(seed)
    return ReIDModel(base, BNNeck(base, NUM_CLASSES, **options))


def images(count: int = 4, img_size: tuple[int, int] = (128, 64)) -> torch.Tensor:
    return torch.randn(count, 3, *img_size, generator=torch.Generator().manual_seed(1))


def encoded(model: VisionTransformer, batch: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return model(patchify(batch, 16), grid_coords(grid).expand(len(batch), -1, -1))


def module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("img_size", [(256, 128), (128, 64)])
def test_mgn_gives_eight_scores_five_triplet_vectors_and_one_feature(img_size):
    model = mgn()
    outputs = model(images(4, img_size))
    assert [tuple(x.shape) for x in outputs["logits"]] == [(4, NUM_CLASSES)] * 8
    assert [x.shape[1] for x in outputs["embeddings"]] == [16, 16, 16, 32, 48]
    assert model.feature_dim == 8 * 16
    assert model.eval().features(images(4, img_size)).shape == (4, 8 * 16)


def test_mgn_has_2048_features_by_default():
    base = encoder()
    assert ReIDModel(base, MGN(base, NUM_CLASSES)).feature_dim == 2048


@pytest.mark.parametrize("split", ["adaptive", "chunk"])
def test_mgn_features_equal_the_written_out_definition(split):
    base = encoder()
    head = MGN(base, NUM_CLASSES, embed_dim=16, split=split)
    model = ReIDModel(base, head)
    model(images(8, (256, 128)))  # running statistics that are not 0 and 1
    model.eval()
    tokens = base.embed(patchify(images(3, (256, 128)), 16), grid_coords((16, 8)).expand(3, -1, -1))
    for block in base.blocks[:-1]:
        tokens = block(tokens)
    rows = {"adaptive": [(0, 6), (5, 11), (10, 16)], "chunk": [(0, 6), (6, 12), (12, 16)]}[split]
    # branch and rows of b1, b2, b3, b21, b22, b31, b32, b33
    places = [(0, (0, 16)), (1, (0, 16)), (2, (0, 16)), (1, (0, 8)), (1, (8, 16)), *((2, part) for part in rows)]
    vectors = []
    for embed, (i, (top, bottom)) in zip(head.embeds, places, strict=True):
        branch = head.branches[i]
        assert isinstance(branch, Branch)
        assert isinstance(embed, PartEmbedding)
        patches = branch.norm(branch.block(tokens))[:, 1:].reshape(3, 16, 8, DIM)
        reduced = patches[:, top:bottom].mean(dim=(1, 2)) @ embed.proj.weight.T
        assert embed.bn.running_mean is not None
        assert embed.bn.running_var is not None
        vectors.append((reduced - embed.bn.running_mean) / (embed.bn.running_var + embed.bn.eps).sqrt())
    expected = torch.cat(vectors, dim=1)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.features(images(3, (256, 128))), expected, rtol=1e-4, atol=1e-5)


def test_branches_start_as_copies_of_the_last_block_and_are_independent():
    base = encoder()
    model = ReIDModel(base, MGN(base, NUM_CLASSES, embed_dim=16))
    assert isinstance(model.head, MGN)
    states = [branch.state_dict() for branch in model.head.branches]
    assert len(states) == 3
    last = base.blocks[-1].state_dict()
    for state in states:
        for name, tensor in last.items():
            assert torch.equal(state[f"block.{name}"], tensor)
        assert torch.equal(state["norm.weight"], base.norm.weight)
    storages = {p.data_ptr() for p in model.head.branches.parameters()} | {p.data_ptr() for p in base.parameters()}
    num_copies = len(list(model.head.branches.parameters()))
    assert len(storages) == num_copies + len(list(base.parameters()))


def test_the_given_encoder_is_left_as_it_was():
    base = encoder()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = ReIDModel(base, MGN(base, NUM_CLASSES, embed_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize("build", [mgn, bnneck, lambda: bnneck(pool="cls_mean")])
def test_every_trainable_parameter_gets_a_gradient(build):
    model = build()
    loss = reid_loss(model(images(6)), torch.tensor([0, 0, 1, 1, 2, 2]))["loss"]
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    patch_grad = model.encoder.patch_embed.proj.weight.grad
    assert patch_grad is not None
    assert patch_grad.abs().sum() > 0


@pytest.mark.parametrize("build", [mgn, bnneck])
def test_normalisation_biases_of_the_head_are_frozen_at_zero(build):
    head = build().head
    biases = [module.bias for module in head.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(biases) in (1, 8)
    assert all(not bias.requires_grad and bias.abs().sum() == 0 for bias in biases)


@pytest.mark.parametrize(("pool", "width"), [("cls", DIM), ("mean", DIM), ("cls_mean", 2 * DIM)])
def test_bnneck_pools_the_encoders_tokens(pool, width):
    base = encoder()
    model = ReIDModel(base, BNNeck(base, NUM_CLASSES, pool=pool))
    tokens = encoded(base, images(), (8, 4))
    pooled = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
    expected = pooled[pool] if pool in pooled else torch.cat([pooled["cls"], pooled["mean"]], dim=1)
    outputs = model(images())
    assert outputs["embeddings"][0].shape == (4, width)
    torch.testing.assert_close(outputs["embeddings"][0], expected)
    assert [tuple(x.shape) for x in outputs["logits"]] == [(4, NUM_CLASSES)]
    torch.testing.assert_close(model.eval().features(images()), expected / expected.norm(dim=1, keepdim=True))


def test_the_test_feature_of_bnneck_may_come_after_the_normalisation():
    before, after = bnneck(neck_feat="before"), bnneck(neck_feat="after")
    after.load_state_dict(before.state_dict())
    for model in (before, after):
        model(images())  # moves the running statistics
        model.eval()
    assert not torch.allclose(before.features(images()), after.features(images()))


@pytest.mark.parametrize("build", [mgn, bnneck])
def test_features_have_length_one_and_do_not_depend_on_the_batch(build):
    model = build().eval()
    features = model.features(images())
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(model.features(images()[1:2]), features[1:2])


@pytest.mark.parametrize("build", [mgn, bnneck])
def test_the_state_of_one_model_makes_another_give_its_features(build):
    first, second = build(0), build(1)
    first(images())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval().features(images()), second.eval().features(images()))


@pytest.mark.parametrize(("num_rows", "split", "rows"), [
    (16, "adaptive", [(0, 6), (5, 11), (10, 16)]),
    (16, "chunk", [(0, 6), (6, 12), (12, 16)]),
    (8, "adaptive", [(0, 3), (2, 6), (5, 8)]),
    (8, "chunk", [(0, 3), (3, 6), (6, 8)]),
])  # fmt: skip
def test_three_parts_average_the_documented_rows(num_rows, split, rows):
    maps = torch.randn(2, 5, num_rows, 4)
    for part, (top, bottom) in zip(split_rows(maps, 3, split), rows, strict=True):
        torch.testing.assert_close(part, maps[:, :, top:bottom].mean(dim=(2, 3)))


@pytest.mark.parametrize(("num_rows", "split"), [(2, "adaptive"), (4, "chunk")])
def test_too_few_rows_for_the_parts_is_an_error(num_rows, split):
    with pytest.raises(UserError, match=f"{num_rows} rows of patches"):
        split_rows(torch.zeros(1, 1, num_rows, 2), 3, split)


def test_an_image_size_that_patches_do_not_divide_is_an_error():
    with pytest.raises(UserError, match="patch_size=16"):
        bnneck()(images(2, (120, 64)))


def test_layer_ids_grow_from_the_input_to_the_head():
    model = mgn()
    assert model.depth == DEPTH
    ids = {name: layer_id(name, model.depth) for name in module_names(model)}
    assert ids["encoder.patch_embed.proj.weight"] == ids["encoder.cls_token"] == 0
    assert ids["encoder.blocks.0.norm1.weight"] == 1
    assert ids["encoder.blocks.1.mlp.fc2.bias"] == 2
    assert {ids[f"head.branches.{i}.block.attn.qkv.weight"] for i in range(3)} == {DEPTH}
    assert ids["head.branches.0.norm.weight"] == DEPTH + 1
    assert ids["head.embeds.7.classifier.weight"] == DEPTH + 1
    assert not any(name.startswith(("encoder.norm", f"encoder.blocks.{DEPTH - 1}")) for name in ids)


def test_bnneck_keeps_the_whole_encoder():
    ids = {name: layer_id(name, DEPTH) for name in module_names(bnneck())}
    assert ids[f"encoder.blocks.{DEPTH - 1}.attn.proj.weight"] == DEPTH
    assert ids["encoder.norm.weight"] == ids["head.classifier.weight"] == DEPTH + 1


@pytest.mark.parametrize("group_size", [None, 8, 4])
def test_grouped_normalisation_equals_batch_normalisation_of_each_group(group_size):
    batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(3)) * 3 + 1
    ours = GroupedBatchNorm(5, group_size)
    torch.nn.init.uniform_(ours.weight)
    groups = batch.split(group_size or 8)
    theirs = [nn.BatchNorm1d(5) for _ in groups]
    for bn in theirs:
        bn.load_state_dict(ours.state_dict())
    expected = torch.cat([bn(group) for bn, group in zip(theirs, groups, strict=True)])
    torch.testing.assert_close(ours(batch), expected)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), torch.stack([getattr(bn, name) for bn in theirs]).mean(0))
    reference = theirs[0].eval()
    reference.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.eval()(batch), reference(batch))


def test_normalising_parts_of_a_batch_elsewhere_gives_the_same_features_and_mean_statistics():
    batch = torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
    whole, *parts = (GroupedBatchNorm(5, 3) for _ in range(3))
    for _ in range(3):
        expected = whole(batch)
        got = torch.cat([bn(share) for bn, share in zip(parts, batch.chunk(2), strict=True)])
        torch.testing.assert_close(got, expected)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(torch.stack([getattr(bn, name) for bn in parts]).mean(0), getattr(whole, name))


def test_groups_that_do_not_fill_a_batch_are_refused():
    with pytest.raises(UserError, match="groups of 5 for batch normalisation must fill the batch of a rank, which is 12"):
        GroupedBatchNorm(3, 5)(torch.zeros(12, 3))


def test_the_neck_has_no_classes_and_normalises_what_is_searched_with():
    base = encoder()
    model = ReIDModel(base, Neck(base, pool="mean"))
    outputs = model(images())
    assert outputs["logits"] == []
    assert not any("classifier" in name for name in module_names(model))
    tokens = encoded(base, images(), (8, 4))
    torch.testing.assert_close(outputs["embeddings"][0], nn.BatchNorm1d(DIM)(tokens[:, 1:].mean(1)))


@pytest.mark.parametrize(("columns", "taken"), [("all", slice(0, 4)), ("middle", slice(1, 3))])
def test_the_neck_pools_rows_from_top_to_bottom(columns, taken):
    base = encoder()
    model = ReIDModel(base, Neck(base, pool="rows", columns=columns, num_rows=8))
    maps = encoded(base, images(), (8, 4))[:, 1:].unflatten(1, (8, 4))
    expected = torch.cat([maps[:, row, taken].mean(dim=1) for row in range(8)], dim=1)
    assert model.feature_dim == 8 * DIM
    torch.testing.assert_close(model(images())["embeddings"][0], nn.BatchNorm1d(8 * DIM)(expected))
    model = ReIDModel(base, Neck(base, pool="rows", columns=columns, num_rows=8)).eval()
    torch.testing.assert_close(model.features(images()), expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_rows_are_of_one_size_of_images():
    base = encoder()
    model = ReIDModel(base, Neck(base, pool="rows", num_rows=8))
    with pytest.raises(UserError, match=r"features of 8 rows need images of 8 rows of patches\. These have 16"):
        model(images(4, (256, 128)))
    with pytest.raises(ValueError, match="num_rows is required"):
        Neck(base, pool="rows")


def test_a_head_of_rows_is_built_again_from_what_its_checkpoint_says():
    base = encoder()
    head = build_head(base, 0, kind="neck", pool="rows", columns="all", num_rows=8)
    assert isinstance(head, Neck)
    assert (head.pool, head.columns, head.num_rows, head.feature_dim) == ("rows", "all", 8, 8 * DIM)
    with pytest.raises(ValueError, match="pools no rows"):
        build_head(base, 3, kind="bnneck", pool="rows")


@pytest.mark.parametrize("build", [mgn, bnneck])
def test_a_fine_tuned_model_gives_its_encoder_back(build):
    model, base = build(), encoder()
    weights = encoder_weights(dict(model.state_dict()))
    assert weights.keys() == base.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("build", [MGN, BNNeck])
def test_a_cosine_classifier_gives_cosines_under_the_same_names(build):
    base = encoder()
    linear, cosine = (ReIDModel(base, build(base, NUM_CLASSES, classifier=kind)) for kind in ("linear", "arc"))
    assert linear.state_dict().keys() == cosine.state_dict().keys()
    logits = cosine(images(6))["logits"]
    assert all(scores.abs().max() <= 1 + 1e-6 for scores in logits)
    embed = cosine.head if isinstance(cosine.head, BNNeck) else cosine.head.get_submodule("embeds.0")
    weight = embed.get_parameter("classifier.weight")
    with torch.no_grad():
        weight.mul_(5)  # only directions count
    torch.testing.assert_close(cosine(images(6))["logits"][0], logits[0])


def test_positions_of_a_taller_image_are_interpolated_into_the_trained_ones():
    base = encoder()
    model = ReIDModel(base, BNNeck(base, NUM_CLASSES), trained_size=(256, 128)).eval()
    tall = images(2, (384, 128))
    y, x = torch.arange(24.0), torch.arange(8.0)
    coords = torch.stack(torch.meshgrid((y + 0.5) * 16 / 24 - 0.5, x, indexing="ij"), dim=-1).reshape(1, -1, 2)
    expected = base(patchify(tall, 16), coords.expand(2, -1, -1))[:, 0]
    torch.testing.assert_close(model.features(tall), expected / expected.norm(dim=1, keepdim=True))
    plain = ReIDModel(base, BNNeck(base, NUM_CLASSES)).eval()
    assert torch.equal(plain.features(images(2, (256, 128))), model.features(images(2, (256, 128))))
    assert not torch.allclose(plain.features(tall), model.features(tall))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_the_running_statistics_alone(bad):
    bn, batch = GroupedBatchNorm(5, 4), torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    bn(batch)
    before = [bn.get_buffer(name).clone() for name in ("running_mean", "running_var")]
    broken = batch.clone()
    broken[5, 2] = bad
    assert not bn(broken).isfinite().all()
    assert [torch.equal(bn.get_buffer(n), b) for n, b in zip(("running_mean", "running_var"), before, strict=True)] == [
        True
    ] * 2
    bn(batch)
    assert not torch.equal(bn.get_buffer("running_mean"), before[0])


@pytest.mark.parametrize("build", [MGN, BNNeck])
def test_ranks_with_one_seed_drop_the_paths_of_a_whole_batch(build):
    torch.manual_seed(0)
    base = VisionTransformer(embed_dim=DIM, depth=DEPTH, num_heads=2, drop_path_rate=0.5)
    model = ReIDModel(base, build(base, NUM_CLASSES)).train()
    batch = images(12)

    for module in model.modules():
        if isinstance(module, GroupedBatchNorm):
            module.eval()  # else the images of a batch would see each other

    def embeddings(rows: slice, seed: int = 7) -> torch.Tensor:
        torch.manual_seed(seed)
        share_drop_path(model, len(batch), rows)
        return torch.cat(model.head(*model.encode(batch[rows]))["embeddings"], dim=1)

    whole = embeddings(slice(0, 12))
    torch.testing.assert_close(torch.cat([embeddings(slice(0, 5)), embeddings(slice(5, 12))]), whole)
    assert not torch.allclose(embeddings(slice(0, 12), seed=8), whole)  # something is dropped


def test_the_start_is_told_in_tensors_that_match_and_that_are_new():
    base = encoder()
    given = len(base.state_dict())
    plain = ReIDModel(base, BNNeck(base, NUM_CLASSES))
    expected = f"{given} of {given} tensors of some/run match. The head starts new: {{}} tensors"
    assert describe_start(plain, "some/run", (64, 32)) == expected.format(len(plain.head.state_dict()))
    parted = ReIDModel(base, MGN(base, NUM_CLASSES))
    copied = 3 * len(Branch(base).state_dict())
    assert describe_start(parted, "some/run", (64, 32)) == expected.format(len(parted.head.state_dict()) - copied)


def test_a_start_of_another_image_size_is_told_with_what_happens_to_positions():
    base = encoder()
    model = ReIDModel(base, BNNeck(base, NUM_CLASSES), trained_size=(128, 64))
    assert "positions" not in describe_start(model, "some/run", (128, 64))
    output = describe_start(model, "some/run", (256, 96))
    assert "It was trained at 128x64 and now sees 256x96" in output
    assert "0.5 x 0.667 of its steps apart" in output
    assert "\n" not in output


def test_settings_come_from_the_weights_and_a_normalisation_given_besides_is_refused():
    own = {"size": "micro", "patch_size": 16, "img_size": [128, 64], "mean": [0.5] * 3, "std": [0.5] * 3}
    record = own | {"img_size": [256, 128], "mean": [0.4] * 3}
    expected = own | {"mean": [0.4] * 3, "trained_size": [256, 128]}
    assert settings_from("a/run", record, own, {"size", "std"}) == expected
    output = r"model.mean=\[0.5, 0.5, 0.5\] must be that of a/run, which is .*. Give model.mean=\[0.4,0.4,0.4\] or leave it out"
    with pytest.raises(UserError, match=output):
        settings_from("a/run", record, own, {"mean"})
    with pytest.raises(UserError, match=r"model\.size=micro must be that of a/run, which is base"):
        settings_from("a/run", record | {"size": "base"}, own, set())
