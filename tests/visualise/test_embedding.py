"""The map of features: who is on it, that neighbours stay neighbours, and what it says of itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from personmae.reid.datasets import DISTRACTOR_PID
from personmae.visualise import embedding
from personmae.visualise.section import NotHere


def clusters(num_groups: int, each: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Unit vectors around a few directions, far apart, and the direction of each."""
    rng = np.random.default_rng(seed)
    directions = np.eye(16)[:num_groups].repeat(each, axis=0)
    drawn = directions + 0.05 * rng.standard_normal(directions.shape)
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32), [
        str(number) for number in range(num_groups) for _ in range(each)
    ]


def test_groups_that_are_apart_stay_apart_and_a_seed_gives_one_map():
    vectors, groups = clusters(4, 12)
    places = embedding.lay_out(vectors, seed=0)
    assert np.isfinite(places).all()
    assert places.min() == 0
    assert places.max() == 1
    distance = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    names = np.array(groups)
    assert (names[distance.argmin(axis=1)] == names).all()
    assert np.array_equal(embedding.lay_out(vectors, seed=0), places)
    assert not np.allclose(embedding.lay_out(vectors[::-1].copy(), seed=0)[::-1], places)  # it is not one answer


def test_shares_of_alike_neighbours_are_those_of_a_loop():
    rng = np.random.default_rng(3)
    vectors = F.normalize(torch.from_numpy(rng.standard_normal((40, 5)).astype(np.float32)), dim=1)
    groups = [str(value) for value in rng.integers(0, 4, 40)]
    alike = 0
    for i in range(40):
        nearest = max((j for j in range(40) if j != i), key=lambda j: float(vectors[i] @ vectors[j]))
        alike += groups[i] == groups[nearest]
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    chance = np.mean([groups[i] == groups[j] for i, j in pairs])
    assert embedding.share_alike(vectors, groups) == pytest.approx((alike / 40, chance))


def test_the_people_with_the_most_images_are_on_it_and_distractors_are_not(found):
    points = embedding.choose(found)
    counts = embedding.count_people(found.benchmark)
    assert DISTRACTOR_PID in {sample.pid for sample in found.benchmark.gallery}
    assert {sample.pid for sample in points.samples} == set(counts)  # fewer than there is room for
    assert len(points.samples) == sum(counts.values())
    assert int(points.queries.sum()) == len(found.benchmark.query)
    everything = [*found.benchmark.query, *found.benchmark.gallery]
    for sample, vector in zip(points.samples[::9], points.vectors[::9], strict=True):
        assert torch.allclose(vector, F.normalize(found.vectors[everything.index(sample)], dim=0), atol=1e-6)


def test_a_person_of_many_images_has_the_room_there_is(found, monkeypatch):
    monkeypatch.setattr(embedding, "MOST_IMAGES", 3)
    monkeypatch.setattr(embedding, "NUM_PEOPLE", 2)
    points = embedding.choose(found)
    assert [sample.pid for sample in points.samples] == [sample.pid for sample in points.samples[:1]] * 3 + [
        sample.pid for sample in points.samples[3:4]
    ] * 3


def test_it_is_drawn_by_person_by_camera_and_with_images(found):
    lines: list[str] = []
    part = embedding.draw(found, 0, lines.append)
    by_person, by_camera, with_images = part.drawings
    for drawing in part.drawings:
        assert drawing.pixels.dtype == np.uint8
        assert drawing.pixels.shape[2] == 3
        assert len(np.unique(drawing.pixels.reshape(-1, 3), axis=0)) > 50  # something is drawn
        assert drawing.alt
    for drawing in (by_person, by_camera):
        assert drawing.html.startswith("<svg")
        assert "var(--curve-0)" in drawing.html
        assert "#0101" not in drawing.html  # a colour that stands for one of the page's
    num_people = len(embedding.count_people(found.benchmark))
    assert f"of {num_people} people" in part.note
    assert "Nothing else has a meaning" in part.note
    assert "laying" in lines[0]
    assert with_images.pixels.shape == (*embedding.SHEET, 3)


def test_too_few_images_are_left_out_with_a_reason(found):
    few = replace(
        found, benchmark=replace(found.benchmark, query=found.benchmark.query[:1], gallery=found.benchmark.gallery[:1])
    )
    with pytest.raises(NotHere, match="at least 8 images"):
        embedding.draw(few, 0, lambda _: None)
