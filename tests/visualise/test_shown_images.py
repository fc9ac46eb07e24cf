"""The sections that look at images: what each draws, says, and cannot draw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_encoders import made, patches, write_pretraining
from made_runs import write_training
from saved_runs import save_pretraining

from personmae import config
from personmae.checkpoint import portable
from personmae.explain import attention, correspondence, sheet
from personmae.explain.reconstruction import open_pretrained
from personmae.report import figures
from personmae.visualise import images
from personmae.visualise.section import Drawing, NotHere, Pair, Shown, Subject, attempt

RIGHT, WRONG = Shown("query/b.jpg", patches(1)), Shown("gallery/c.jpg", patches(2))
QUERY = Shown("query/a.jpg", patches(1))


def subject(where: str = "made", head: str = "mgn", **fields) -> Subject:
    given = {"images": [QUERY, WRONG], "pairs": [Pair(QUERY, RIGHT, True), Pair(QUERY, WRONG, False)]} | fields
    return Subject(where=where, encoder=made(head), seed=0, **given)


@pytest.fixture
def run(tmp_path: Path, shard_dir: Path) -> Path:
    """A pre-training on the session's shards, with random weights, at step 2."""
    return save_pretraining(tmp_path / "run", shard_dir, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))


def said(drawing: Drawing) -> str:
    return f"{drawing.title} {drawing.caption} {drawing.alt}"


def test_reconstructions_are_those_of_the_report_and_say_what_colours_them(run):
    part = images.reconstructions(subject(str(run), images=[QUERY] * 3))
    settings = config.load(config.Pretrain, run / "config.yaml")
    expected = figures.reconstruct_run(settings, run, 3)
    assert len(part.drawings) == 3
    assert figures.FOOTNOTE in part.note
    for number, drawing in enumerate(part.drawings):
        shown = [batch[number].numpy() for batch in expected]
        assert np.array_equal(drawing.pixels, sheet.row(shown, figures.CAPTIONS))
        away = np.abs(shown[4].astype(float) - shown[2]).mean()
        assert f"{away:.0f} ² grey levels" in drawing.caption
        assert all(words in drawing.alt for words in figures.REGION_WORDS)
    assert not np.array_equal(part.drawings[0].pixels, part.drawings[1].pixels)


def test_a_checkpoint_that_is_named_is_the_one_that_predicts(run):
    path = portable.locate(run)
    older = images.reconstructions(subject(str(path), images=[QUERY])).drawings[0].pixels
    student = {name: torch.zeros_like(t) for name, t in open_pretrained(run, device="cpu").model.state_dict().items()}
    write_pretraining(run, step=5, student=student)
    assert np.array_equal(images.reconstructions(subject(str(path), images=[QUERY])).drawings[0].pixels, older)
    assert not np.array_equal(images.reconstructions(subject(str(run), images=[QUERY])).drawings[0].pixels, older)


def test_what_was_not_pre_trained_here_has_no_reconstructions(tmp_path):
    settings = config.Finetune.model_validate({"run_dir": str(tmp_path / "run"), "root": "x", "init": "random"})
    write_training(tmp_path / "run", settings, step=2, total=2)
    for where in (tmp_path / "run", tmp_path, tmp_path / "absent.pth"):
        with pytest.raises(NotHere, match="only a pre-training run can predict hidden patches"):
            images.reconstructions(subject(str(where)))


def test_shards_that_are_gone_leave_the_section_out_as_lost(run):
    text = (run / "config.yaml").read_text()
    settings = config.load(config.Pretrain, run / "config.yaml")
    (run / "config.yaml").write_text(text.replace(settings.data.shards, "/nowhere/shards"))
    section = attempt("reconstructions", lambda: images.reconstructions(subject(str(run))))
    assert section.lost
    assert "/nowhere/shards is needed by" in section.missing


@pytest.mark.parametrize(("head", "is_pooled"), [("mgn", True), ("neck", True), ("none", True), ("bnneck", False)])
def test_attention_is_drawn_over_each_image_and_its_limits_are_said(head, is_pooled):
    given = subject(head=head)
    part = images.attention(given)
    assert ("not from the class token" in part.note) is is_pooled
    assert "does not show what the model needs" in part.note
    assert [drawing.title for drawing in part.drawings] == ["query/a.jpg", "gallery/c.jpg"]
    for shown, drawing in zip(given.images, part.drawings, strict=True):
        heat = attention.rollout(given.encoder, shown.pixels)
        assert drawing.caption == attention.in_words(heat)
        assert attention.in_words(heat) in drawing.alt
        large = sheet.scaled(shown.pixels, images.HEIGHT)
        overlaid = attention.overlay(large, heat)
        width = large.shape[1]
        below = drawing.pixels[sheet.GAP + sheet.LINE : -sheet.GAP, -sheet.GAP - width : -sheet.GAP]
        assert np.array_equal(below, overlaid)


def test_matches_are_drawn_for_a_right_and_a_wrong_image():
    given = subject()
    right, wrong = images.correspondence(given).drawings
    assert right.caption == "The same person. 32 of 32 patches match, the drawn ones with a mean similarity of 1.00."
    assert wrong.caption.startswith("Another person. ")
    assert said(right).count("query/a.jpg") == 2
    for pair, drawing in zip(given.pairs, (right, wrong), strict=True):
        found = correspondence.match(given.encoder, pair.first.pixels, pair.second.pixels)
        assert correspondence.in_words(found) in drawing.alt
        assert drawing.pixels.shape[0] == images.HEIGHT


def test_without_images_or_pairs_a_section_says_so():
    nothing = subject(images=[], pairs=[])
    assert "no images to look at" in attempt("attention", lambda: images.attention(nothing)).missing
    section = attempt("correspondence", lambda: images.correspondence(nothing))
    assert "no pairs of images to match" in section.missing
    assert not section.lost


def test_names_that_are_no_utf8_can_be_written():
    odd = Shown("caf\udce9.jpg", QUERY.pixels)
    given = subject(images=[odd], pairs=[Pair(odd, odd, True)])
    for part in (images.attention(given), images.correspondence(given)):
        said(part.drawings[0]).encode()
