"""The search behind the pictures: evaluate's own scores, and which queries are chosen."""

import json

import numpy as np
import pytest

from personmae.visualise import search


def test_the_scores_are_those_that_evaluate_wrote(found, tuned):
    recorded = json.loads((tuned / "result.json").read_text())
    for score in ("mAP", "rank1", "rank10", "mINP", "cmc", "benchmark_digest", "num_valid", "num_gallery"):
        assert found.record[score] == recorded[score]
    assert 0 < found.record["mAP"] < 1
    assert np.nanmean(found.ap) == pytest.approx(found.record["mAP"], abs=1e-6)


def test_the_kinds_of_queries_are_the_ends_of_their_orders(found):
    chosen = {"best": search.best(found, 4), "worst": search.worst(found, 4), "confused": search.most_confused(found, 4)}
    others = {name: np.setdiff1d(found.valid, queries) for name, queries in chosen.items()}
    assert all(len(set(queries.tolist())) == 4 and len(others[name]) > 4 for name, queries in chosen.items())
    assert found.ap[chosen["best"]].min() >= found.ap[others["best"]].max()
    assert found.ap[chosen["worst"]].max() <= found.ap[others["worst"]].min()
    assert found.wrong_score[chosen["confused"]].min() >= found.wrong_score[others["confused"]].max()
    assert (np.diff(found.ap[chosen["best"]]) <= 0).all()
    assert (np.diff(found.wrong_score[chosen["confused"]]) <= 0).all()


def test_what_is_drawn_by_chance_follows_from_the_seed(found):
    drawn = [search.drawn(found, 6, seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 6
    assert set(drawn[0]) <= set(found.valid.tolist())
    assert search.drawn(found, 10_000, 0).tolist() == found.valid.tolist()


def test_the_nearest_images_are_those_of_the_similarities_without_what_the_protocol_removes(found):
    queries = np.array([0, 5, 11])
    similarity = found.similarity(queries).numpy()
    for row, query, near in zip(similarity, queries.tolist(), found.nearest(queries), strict=True):
        person = found.sample(query)
        own = [g.pid == person.pid and g.camid == person.camid for g in found.benchmark.gallery]
        row[np.array(own)] = -np.inf
        assert near == np.argsort(-row, kind="stable")[:10].tolist()
        assert [found.is_match(query, number) for number in near] == [found.found(number).pid == person.pid for number in near]
        wrong = [g.pid != person.pid for g in found.benchmark.gallery]
        best = int(np.argmax(np.where(wrong, row, -np.inf)))
        assert found.wrong[query] == best
        assert found.wrong_score[query] == pytest.approx(row[best], abs=1e-6)  # of products of other sizes
