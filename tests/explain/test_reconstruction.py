"""Hidden patches of one image, predicted by a checkpoint of a pre-training: what is hidden cannot be seen in it."""

from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from made_encoders import GRID, SIZE, patches, write_pretraining

from personmae.checkpoint import portable
from personmae.checkpoint.writer import Writer
from personmae.errors import UserError
from personmae.explain import reconstruction
from personmae.explain.reconstruction import GREY, Pretrained, open_pretrained, reconstruct
from personmae.model.inputs import normalise
from personmae.model.personmae import PersonMAE
from personmae.model.vit import grid_coords, patchify
from personmae.weights import stored


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pretrained, PersonMAE]:
    run, student = write_pretraining(tmp_path_factory.mktemp("explain") / "run")
    return open_pretrained(run, device="cpu"), student


def a_mask(num_hidden: int, seed: int = 0) -> np.ndarray:
    mask = np.zeros(GRID, bool)
    mask.flat[np.random.default_rng(seed).permutation(mask.size)[:num_hidden]] = True
    return mask


def each_patch(image: np.ndarray) -> torch.Tensor:
    """(L, P), as the network orders the pixels of a patch."""
    return patchify(torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None], 16)[0]


@pytest.mark.parametrize("num_hidden", [1, 16, 24, 31])
@pytest.mark.parametrize("use_target", [False, True])
def test_any_number_of_patches_can_be_hidden_and_is_predicted_patch_by_patch(opened, num_hidden, use_target):
    pretrained, student = opened
    image, mask = patches(1), a_mask(num_hidden)
    drawn = reconstruct(pretrained, image, mask, use_target_statistics=use_target)
    assert drawn.uses_target_statistics is use_target
    assert (drawn.num_hidden, drawn.num_patches) == (num_hidden, 32)
    np.testing.assert_array_equal(drawn.region_a, image)
    np.testing.assert_array_equal(drawn.region_b, image)

    hidden = torch.from_numpy(mask.ravel())
    grey = (each_patch(drawn.masked) == GREY).all(dim=1)
    assert torch.equal(grey, hidden)
    assert torch.equal(each_patch(drawn.masked)[~hidden], each_patch(image)[~hidden])

    normal, coords = normalise(each_patch(image)[None], (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)), grid_coords(GRID)
    with torch.no_grad():
        pred = student.predict_pixels(
            {"patches_a": normal[:, ~hidden], "coords_a": coords[~hidden][None], "coords_b": coords[None]}
        )[0]
    got, mean = each_patch(drawn.prediction), torch.tensor([0.4, 0.5, 0.6]).repeat_interleave(256)
    for number in range(32):
        source = normal[0, number] if use_target else normal[0, ~hidden]
        wanted = ((pred[number] * source.std() + source.mean()) * 0.2 + mean) * 255
        assert (got[number] - wanted.clamp(0, 255)).abs().max() <= 0.51
    assert got.std() > 5


def test_what_is_hidden_changes_no_prediction_but_with_its_own_statistics(opened):
    pretrained, _ = opened
    mask = a_mask(20)
    pixels = mask.repeat(16, axis=0).repeat(16, axis=1)[..., None]
    image, other = patches(1), np.where(pixels, patches(2) // 2, patches(1)).astype(np.uint8)
    ours, theirs = (reconstruct(pretrained, one, mask) for one in (image, other))
    assert (ours.region_b != theirs.region_b).any()
    np.testing.assert_array_equal(ours.masked, theirs.masked)
    np.testing.assert_array_equal(ours.prediction, theirs.prediction)
    ours, theirs = (reconstruct(pretrained, one, mask, use_target_statistics=True) for one in (image, other))
    assert (ours.prediction != theirs.prediction).any()


def test_words_say_which_statistics_colour_the_prediction(opened):
    drawn = reconstruct(opened[0], patches(), a_mask(3))
    assert drawn.in_words == (
        "3 of 32 patches are hidden. The prediction is drawn with one mean and one std per image, of RegionA's visible "
        "patches: nothing of the target is used."
    )
    assert "gives away its colours" in reconstruct(opened[0], patches(), a_mask(3), use_target_statistics=True).in_words


def test_a_run_that_gave_visible_tokens_their_positions_again_is_read_so(tmp_path):
    run, student = write_pretraining(tmp_path / "run", visible_positions=True)
    pretrained = open_pretrained(run, device="cpu")
    assert pretrained.model.visible_positions
    assert pretrained.step == 2
    assert Path(pretrained.where).parent == portable.folder(run)
    batch = {
        "patches_a": torch.randn(1, 5, 768, generator=torch.Generator().manual_seed(1)),
        "coords_a": grid_coords(GRID)[None, :5],
        "coords_b": grid_coords(GRID)[None],
    }
    with torch.no_grad():
        assert torch.equal(pretrained.model.predict_pixels(batch), student.predict_pixels(batch))
        student.visible_positions = False
        assert not torch.allclose(pretrained.model.predict_pixels(batch), student.predict_pixels(batch))


def test_an_encoder_that_came_from_another_project_is_opened_too(tmp_path):
    run, _ = write_pretraining(tmp_path / "run", {"encoder": {"table": list(GRID), "num_registers": 2}})
    pretrained = open_pretrained(run, device="cpu")
    assert pretrained.model.encoder.table == GRID
    assert reconstruct(pretrained, patches(), a_mask(20)).prediction.std() > 5


@pytest.mark.parametrize("size", [(300, 900), (1000, 90), (1, 1), (37, 3000), (128, 64)])
def test_an_image_of_any_size_becomes_the_region(opened, size):
    coarse = np.random.default_rng(5).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    image = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_LINEAR)
    drawn = reconstruct(opened[0], image, a_mask(24))
    assert drawn.region_a.shape == drawn.prediction.shape == (*SIZE, 3)
    wanted = cv2.resize(image, SIZE[::-1], interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(drawn.region_a.astype(int) - wanted).mean() < 8


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.zeros(GRID, bool), r"must hide at least 1 of 32 patches and leave at least 1 visible. This one hides 0"),
        (np.ones(GRID, bool), r"This one hides 32"),
        (np.zeros((4, 8), bool), r"a mask of 8 x 4 patches, True where hidden, is required. Got 4 x 8 of bool"),
        (np.zeros(32, bool), r"Got 32 of bool"),
        (np.zeros(GRID, np.uint8), r"Got 8 x 4 of uint8"),
    ],
    ids=["nothing", "everything", "turned", "flat", "numbers"],
)
def test_a_mask_that_cannot_be_used_is_refused(opened, mask, said):
    with pytest.raises(UserError, match=said):
        reconstruct(opened[0], patches(), mask)


def test_what_is_no_image_is_refused(opened):
    with pytest.raises(UserError, match="an image is a path"):
        reconstruct(opened[0], np.zeros((0, 5, 3), np.uint8), a_mask(3))


def test_what_has_no_decoder_is_refused_with_a_reason(tmp_path):
    with closing(Writer(tmp_path / "finetuned", keep_last=1)) as writer:
        writer.save(portable.Checkpoint(2, {"model": {"model.a": torch.zeros(1)}}, {"total_steps": 2, "model": {}}))
    write_pretraining(tmp_path / "alone", student={"cls_token": torch.zeros(1, 1, 128)})
    for run in (tmp_path / "finetuned", tmp_path / "alone"):
        with pytest.raises(UserError, match=r"a pre-training run with its decoder is required .* has no decoder of pixels"):
            open_pretrained(run)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / stored.DESCRIPTION).write_text("{}")
    with pytest.raises(UserError, match=r"exported is an exported folder, which holds no decoder: name the run itself"):
        open_pretrained(tmp_path / "exported")
    with pytest.raises(UserError, match="absent does not exist"):
        open_pretrained(tmp_path / "absent")


def test_the_decoder_alone_is_read_and_the_rest_of_a_student_is_not(opened):
    pretrained, student = opened
    own = pretrained.model.state_dict()
    assert {name.split(".")[0] for name in student.state_dict()} - {name.split(".")[0] for name in own} == {
        "feature_decoder",
        "identity_head",
    }
    assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in own.items())
    assert not any(parameter.requires_grad for parameter in pretrained.model.parameters())
    assert reconstruction.VISIBLE_STATISTICS != reconstruction.TARGET_STATISTICS
