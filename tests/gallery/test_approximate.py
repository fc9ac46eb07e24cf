"""FAISS beside the exact search: what it misses is what is printed, and it follows what is added and removed."""

import shutil
import sys

import galleries
import numpy as np
import pytest
import torch
from galleries import build, inputs, named

from personmae.errors import UserError
from personmae.gallery import approximate, edit, search
from personmae.gallery.catalog import Gallery, open_gallery

pytest.importorskip("faiss", reason="faiss-cpu is not installed: personmae[gallery]")


def recall(gallery: Gallery) -> float:
    """Recall@10 by a loop over rows as ids are searched, without the row itself."""
    rows = np.unique(np.linspace(0, len(gallery) - 1, approximate.SAMPLE).astype(np.int64))
    queries = search.by_ids(gallery, [galleries.ids_of(gallery)[row] for row in rows], each=True)
    wanted, found = (search.search(gallery, queries, only_exact=only).hits for only in (True, False))
    shares = [len({h.id for h in a} & {h.id for h in b}) / 10 for a, b in zip(wanted, found, strict=True)]
    return float(np.mean(shares))


def test_the_recall_that_is_printed_is_what_a_search_finds_of_the_exact_one(tmp_path):
    gallery = open_gallery(build(tmp_path, named(2000), index="faiss"))
    index = gallery.manifest.index
    assert index
    assert index["recall"] >= approximate.TARGET
    assert index["recall"] == pytest.approx(recall(gallery), abs=1e-3)
    assert f"recall@10 {index['recall']:.3f} of the exact search on 256 images" in search.in_words(gallery)
    assert index["num_probes"] < index["num_lists"]  # or it would be no faster than the exact search


def test_fewer_lists_find_less(tmp_path):
    gallery = open_gallery(build(tmp_path, named(2000), index="faiss"))
    assert gallery.manifest.index
    index = approximate.read(gallery.folder / gallery.manifest.index["file"])
    rows = np.arange(0, 2000, 10)
    queries = torch.from_numpy(gallery.features(rows))
    exact = approximate.exact.search(gallery, queries, 10).rows.tolist()
    found = [approximate.search(index, gallery, queries, 10, num_probes=n).rows.tolist() for n in (1, index.nlist)]
    shares = [approximate.recall_of(list(map(set, rows)), list(map(set, exact))) for rows in found]
    assert shares[0] < shares[1]
    assert shares[1] > 0.99


def test_scores_are_those_of_the_exact_search(tmp_path):
    gallery = open_gallery(build(tmp_path, named(500), index="faiss"))
    queries = search.by_ids(gallery, named(500)[:20], each=True)
    found = search.search(gallery, queries)
    assert found.how.startswith("faiss IVF")
    for query, hits in zip(queries, found.hits, strict=True):
        assert len(hits) == 10
        assert query.names[0] not in [hit.id for hit in hits]
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        for hit in hits:
            assert hit.score == pytest.approx(float(galleries.feature(query.names[0]) @ galleries.feature(hit.id)), abs=1e-6)


def test_what_is_added_is_found_and_what_is_removed_is_not(tmp_path):
    where = build(tmp_path, named(500), index="faiss")
    twins = named(40, "b")
    edit.add(where, inputs(tmp_path, twins))
    gallery = open_gallery(where)
    assert gallery.manifest.index
    assert gallery.manifest.index["recall"] == pytest.approx(recall(gallery), abs=1e-3)
    probe = search.Query(("?",), torch.from_numpy(galleries.feature(twins[7])))
    first = search.search(gallery, [probe])
    assert (first.hits[0][0].id, first.how[:5]) == (twins[7], "faiss")
    edit.remove(where, [twins[7], named(500)[0]])
    gallery = open_gallery(where)
    assert gallery.manifest.index
    index = approximate.read(where / gallery.manifest.index["file"])
    assert index.ntotal == len(gallery) == 538
    again = search.search(gallery, [probe])
    assert again.how.startswith("faiss")
    assert [hit.id for hit in again.hits[0]][:5] == [hit.id for hit in first.hits[0]][1:6]
    assert len(list(where.glob("index-*"))) == 1


def test_the_index_of_a_gallery_that_was_built_in_its_place_is_not_taken(tmp_path):
    where = build(tmp_path, named(100), index="faiss")
    gallery = open_gallery(where)
    queries = search.by_ids(gallery, named(100)[:5], each=True)
    expected = search.search(gallery, queries, only_exact=True).hits
    shutil.rmtree(where)
    build(tmp_path, named(500, "b"), index="faiss")
    found = search.search(gallery, queries)
    assert found.how == "exact"
    assert [[(hit.id, hit.score) for hit in hits] for hits in found.hits] == [
        [(hit.id, hit.score) for hit in hits] for hits in expected
    ]
    assert search.search(open_gallery(where), search.by_ids(open_gallery(where), named(1, "b"))).how.startswith("faiss")


def test_filters_are_searched_exactly(tmp_path):
    gallery = open_gallery(build(tmp_path, named(500), index="faiss"))
    queries = search.by_ids(gallery, named(500)[:5])
    assert search.search(gallery, queries, filters=search.Filters(cameras=("2",))).how == "exact"
    assert search.search(gallery, queries, only_exact=True).how == "exact"
    assert search.search(gallery, queries, top=0).how == "exact"


def test_without_faiss_a_search_is_exact_and_a_removal_still_removes(tmp_path, monkeypatch):
    where = build(tmp_path, named(100), index="faiss")
    monkeypatch.setitem(sys.modules, "faiss", None)
    said: list[str] = []
    gallery = open_gallery(where)
    assert search.search(gallery, search.by_ids(gallery, named(1)), log=said.append).how == "exact"
    with pytest.raises(UserError, match=r"faiss is required .* pip install 'personmae\[gallery\]'"):
        edit.add(where, inputs(tmp_path, named(3, "b")))
    with pytest.raises(UserError, match="faiss is required"):
        build(tmp_path / "x", named(3), index="faiss") if (tmp_path / "x").mkdir() is None else None
    edit.remove(where, named(1), log=said.append)
    assert list(where.glob("index-*")) == []
    assert [line.partition(",")[0] for line in said] == ["faiss is not installed", "the index is deleted"]
