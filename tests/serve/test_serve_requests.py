"""What the page is answered: the same as the verbs and functions below it find, and nothing of who was removed."""

import base64
import io
import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import Made, Page, png, service_of, serving

from personmae import images
from personmae.explain import correspondence, reconstruction
from personmae.gallery import edit, search, store
from personmae.gallery.catalog import open_gallery
from personmae.gallery.search import Filters
from personmae.serve.models import Models

SOME = {"images": [{"key": 0}]}


def rows_of(at: Page, **query: Any) -> list[dict[str, Any]]:
    return at.get("/api/rows", params=query).json()["rows"]


def found(answer: Any) -> list[tuple[str, float]]:
    return [(hit["id"], hit["score"]) for hit in answer.json()["hits"]]


def expected(answer: search.Answer) -> list[tuple[str, Any]]:
    (hits,) = answer.hits
    return [(hit.id, pytest.approx(hit.score, abs=1e-6)) for hit in hits]


def decoded(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


# --- search ---


@pytest.mark.parametrize(
    ("options", "filters", "more"),
    [
        ({}, Filters(), {}),
        ({"top": 5}, Filters(), {"top": 5}),
        ({"cameras": ["1", "2"]}, Filters(cameras=("1", "2")), {}),
        ({"other_cameras": True}, Filters(other_cameras=True), {}),
        ({"since": "50", "until": "200"}, Filters(since=50, until=200), {}),
        ({"rerank": 15}, Filters(), {"rerank": 15}),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_search_by_rows_is_that_of_the_gallery(made: Made, page: Page, options, filters, more):
    gallery = open_gallery(made.gallery)
    names = gallery.rows["id"].to_pylist()[3:5]
    keys = gallery.rows["key"].to_pylist()[3:5]
    answer = search.search(gallery, search.by_ids(gallery, names), filters=filters, **{"top": 20, **more})
    got = page.ask("/api/search", {"images": [{"key": key} for key in keys], **options})
    assert found(got) == expected(answer)
    assert len(found(got)) > 3
    assert [hit["rank"] for hit in got.json()["hits"]] == list(range(1, len(found(got)) + 1))
    assert got.json()["how"] == answer.how
    if "rerank" in options:
        assert [hit["reranked"] for hit in got.json()["hits"][:15]] == pytest.approx([h.reranked for h in answer.hits[0][:15]])


def test_a_search_by_uploads_is_that_of_the_same_pixels_and_boxes(made: Made, page: Page):
    gallery, encoder = open_gallery(made.gallery), page.service.models.encoder.get()
    one, other = images.decode(made.image(2)).pixels, images.decode(made.image(9)).pixels
    height, width = one.shape[:2]
    box = {"left": 0.25, "top": 0.1, "right": 1.0, "bottom": 0.6}
    part = one[math.floor(0.1 * height) : math.ceil(0.6 * height), math.floor(0.25 * width) :]
    whole = search.search(gallery, search.by_images(gallery, encoder, [one]), top=20)
    got = page.ask("/api/search", {"images": [{"upload": 0}]}, [made.image(2)])
    assert found(got) == expected(whole)
    assert got.json()["hits"][0]["score"] == pytest.approx(1, abs=1e-5)  # the very image, which is a row of the gallery too
    boxed = search.search(gallery, search.by_images(gallery, encoder, [part]), top=20)
    assert found(page.ask("/api/search", {"images": [{"upload": 0, "box": box}]}, [made.image(2)])) == expected(boxed)
    assert expected(boxed) != expected(whole)
    key = gallery.rows["key"].to_pylist()[5]
    parts = search.by_ids(gallery, [gallery.rows["id"].to_pylist()[5]]) + search.by_images(gallery, encoder, [one, other])
    together = search.search(gallery, [search.joined(parts)], top=20)
    asked = {"images": [{"upload": 0}, {"key": key}, {"upload": 1}]}
    assert found(page.ask("/api/search", asked, [made.image(2), made.image(9)])) == expected(together)


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"images": []}, 422, "images: List should have at least 1 item"),
        ({"images": [{}]}, 422, "an image of the gallery or an upload is required"),
        ({"images": [{"key": 0, "upload": 0}]}, 422, "an image of the gallery or an upload is required"),
        ({"images": [{"key": 99_999}]}, 410, "that image is not in the gallery any more"),
        ({"images": [{"key": 1 << 63}]}, 422, "images.0.key: Input should be less than"),
        ({"images": [{"upload": 0}]}, 422, "an uploaded image is named that was not sent"),
        (
            {"images": [{"key": 0, "box": {"left": 0.5, "top": 0, "right": 0.2, "bottom": 1}}]},
            422,
            "left must be less than right",
        ),
        ({"images": [{"upload": 0, "box": {"left": float("nan"), "top": 0, "right": 1, "bottom": 1}}]}, 422, "finite number"),
        ({"images": [{"key": 0}] * 9}, 422, "at most 8 images are taken as one person"),
        ({**SOME, "top": 0}, 422, "top: Input should be greater than"),
        ({**SOME, "top": 100_000}, 422, "top: Input should be less than"),
        ({**SOME, "cameras": ["<b>"]}, 422, "the gallery has no camera '<b>' any more"),
        ({**SOME, "since": "yesterday"}, 422, "a time must be a number or a date"),
        ({**SOME, "since": "2026-01-01"}, 422, "the time 'from' must be a number"),
        ({**SOME, "path": "/etc/passwd"}, 422, "path: Extra inputs are not permitted"),
        ("x", 422, "the request: Input should be"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_what_cannot_be_searched_for_is_refused_in_one_line(made: Made, page: Page, request_, status, words):
    answer = page.ask("/api/search", request_)
    assert answer.status_code == status
    assert words in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert str(made.gallery) not in answer.text


def test_an_upload_has_no_camera_to_leave_out(made: Made, page: Page):
    answer = page.ask("/api/search", {"images": [{"upload": 0}], "other_cameras": True}, [made.image()])
    assert answer.status_code == 422
    assert "the camera of an uploaded image is not known" in answer.json()["error"]


# --- pictures ---


def test_a_comparison_is_that_of_the_stored_image_and_the_upload(made: Made, page: Page):
    encoder, gallery = page.service.models.encoder.get(), open_gallery(made.gallery)
    first, second = images.decode(made.image(1)).pixels, images.decode(gallery.thumbnail(7)).pixels
    key = gallery.rows["key"].to_pylist()[7]
    got = page.ask("/api/compare", {"query": {"upload": 0}, "key": key}, [made.image(1)]).json()
    pairs = correspondence.match(encoder, first, second)
    assert [match["similarity"] for match in got["matches"]] == pytest.approx([pair.similarity for pair in pairs])
    assert len(pairs) > 2
    for match, pair in zip(got["matches"], pairs, strict=True):
        for (x, y), (row, column) in ((match["first"], pair.first), (match["second"], pair.second)):
            assert (x, y) == (pytest.approx((column + 0.5) / 4), pytest.approx((row + 0.5) / 8))
    assert got["words"] == correspondence.in_words(pairs)
    assert got["row"]["id"] == gallery.rows["id"].to_pylist()[7]
    assert decoded(got["first"]).shape == first.shape
    assert np.abs(decoded(got["second"]).astype(int) - second).mean() < 3


def test_a_reconstruction_is_that_of_the_drawn_mask(made: Made, page: Page):
    pretrained = page.service.models.pretrained.get()
    mask = np.random.default_rng(1).random(pretrained.grid) < 0.6
    ours = reconstruction.reconstruct(pretrained, images.decode(made.image(4)).pixels, mask)
    got = page.ask("/api/reconstruct", {"image": {"upload": 0}, "mask": mask.tolist()}, [made.image(4)]).json()
    for name in ("region_a", "masked", "prediction", "region_b"):
        np.testing.assert_array_equal(decoded(got[name]), getattr(ours, name))
    assert got["words"] == ours.in_words
    assert "nothing of the target is used" in got["words"]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[True] * 4] * 8, "leave at least 1 visible"),
        ([[False] * 4] * 8, "must hide at least 1"),
        ([[True] * 5] * 8, "a mask of 8 x 4 patches is required"),
        ([[True]], "a mask of 8 x 4 patches is required"),
        ([[True] * 300] * 8, "mask.0: List should have at most 256 items"),
    ],
    ids=["all", "nothing", "wide", "one", "long"],
)
def test_a_mask_that_cannot_be_used_is_refused(page: Page, mask, words):
    answer = page.ask("/api/reconstruct", {"image": {"key": 0}, "mask": mask})
    assert answer.status_code == 422
    assert words in answer.json()["error"]


def test_without_a_model_uploads_are_refused_with_the_remedy_and_rows_are_searched(made: Made):
    with serving(service_of(made, with_models=False)) as page:
        refused = page.ask("/api/search", {"images": [{"upload": 0}]}, [made.image()])
        assert refused.status_code == 409
        assert "start it with --model RUN" in refused.json()["error"]
        assert len(page.ask("/api/search", SOME).json()["hits"]) == 20
        page.service.models.encoder.state = "loading"
        refused = page.ask("/api/search", {"images": [{"upload": 0}]}, [made.image()])
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "3")
        assert page.get("/api/state").json()["encoder"] == "loading"
        assert "panel-reconstruct" not in page.get("/").text


# --- the gallery ---


def test_rows_come_in_pages_by_camera_and_part_of_an_id(made: Made, page: Page):
    ids = open_gallery(made.gallery).rows["id"].to_pylist()
    total, found, number = page.get("/api/rows").json()["total"], [], 0
    while rows := rows_of(page, page=number):
        found, number = found + [row["id"] for row in rows], number + 1
    assert found == ids
    assert total == len(ids)
    of_camera = rows_of(page, camera="2")
    assert {row["camera"] for row in of_camera} == {"2"}
    assert [row["id"] for row in rows_of(page, part=ids[9].upper())] == [ids[9]]
    assert rows_of(page, part="no such id") == []
    assert page.get("/api/rows", params={"page": -1}).status_code == 422
    state = page.get("/api/state").json()
    assert state["num_images"] == total
    assert state["times"] == ["0", f"{10 * (total - 1)}"]


def test_a_thumbnail_is_the_one_of_its_key(made: Made, page: Page):
    gallery = open_gallery(made.gallery)
    for number, key in enumerate(gallery.rows["key"].to_pylist()[:5]):
        answer = page.get(f"/thumbnail/{key}")
        assert answer.content == gallery.thumbnail(number)
        assert answer.headers["content-type"] == "image/jpeg"
    assert page.get("/thumbnail/99999").status_code == 410
    for wrong in ("-1", "x", "../gallery.json", "%2e%2e%2fgallery.json", str(1 << 70)):
        assert page.get(f"/thumbnail/{wrong}").status_code in (404, 422)


def test_who_is_removed_is_gone_from_the_next_request_on(made: Made, tmp_path: Path):
    shutil.copytree(made.gallery, tmp_path / "gallery")
    with serving(service_of(made, gallery=tmp_path / "gallery")) as page:
        query, gone = (row for row in rows_of(page)[2:4])
        before = page.ask("/api/search", {"images": [{"key": query["key"]}], "top": 200})
        assert gone["id"] in [name for name, _ in found(before)]
        edit.remove(tmp_path / "gallery", [gone["id"]])
        after = page.ask("/api/search", {"images": [{"key": query["key"]}], "top": 200})
        left = [(name, pytest.approx(score, abs=1e-6)) for name, score in found(before) if name != gone["id"]]
        assert found(after) == left
        assert gone["id"] not in page.get("/api/rows").text
        assert page.get(f"/thumbnail/{gone['key']}").status_code == 410
        for path, request in (
            ("/api/search", {"images": [{"key": gone["key"]}]}),
            ("/api/compare", {"query": {"key": query["key"]}, "key": gone["key"]}),
            ("/api/reconstruct", {"image": {"key": gone["key"]}, "mask": [[True] * 4] * 4 + [[False] * 4] * 4}),
        ):
            assert page.ask(path, request).status_code == 410
        assert page.get("/api/state").json()["num_images"] == len(found(before))  # the query itself is not among them
        shutil.rmtree(tmp_path / "gallery")
        answer = page.get("/api/state")
        assert answer.status_code == 503
        assert str(tmp_path) not in answer.text


def test_a_gallery_that_is_built_again_in_the_same_place_is_seen(made: Made, tmp_path: Path):
    def build(numbers: slice) -> list[str]:
        shutil.rmtree(tmp_path / "gallery", ignore_errors=True)
        gallery = open_gallery(made.gallery)
        ids = gallery.rows["id"].to_pylist()[numbers]
        np.save(tmp_path / "some.npy", gallery.features(np.arange(len(gallery))[numbers]))
        (tmp_path / "some.ids.txt").write_text("".join(f"{name}\n" for name in ids))
        edit.build(edit.Inputs(str(tmp_path / "some.npy")), tmp_path / "gallery")
        return ids

    first = build(slice(0, 4))
    with serving(service_of(made, gallery=tmp_path / "gallery")) as page:
        assert [row["id"] for row in rows_of(page)] == first
        before = open_gallery(tmp_path / "gallery").manifest.generation
        second = build(slice(4, 8))
        assert open_gallery(tmp_path / "gallery").manifest.generation == before
        assert [row["id"] for row in rows_of(page)] == second
        for path, request in (  # of a browser that has shown the first
            ("/api/search", {"images": [{"key": 0, "id": first[0]}]}),
            ("/api/compare", {"query": {"upload": 0}, "key": 0, "id": first[0]}),
            ("/api/reconstruct", {"image": {"key": 0, "id": first[0]}, "mask": [[True] * 4] * 4 + [[False] * 4] * 4}),
        ):
            assert page.ask(path, request, [made.image()]).status_code == 410
        assert page.ask("/api/search", {"images": [{"key": 0, "id": second[0]}]}).status_code == 200
        assert [row["has_thumbnail"] for row in rows_of(page)] == [False] * 4
        assert page.get("/thumbnail/0").status_code == 404


def test_nothing_of_an_upload_is_written_to_the_disk(made: Made, page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starlette's parser of forms writes what is larger than 1 MB into a temporary file, unless it is told not to."""
    import tempfile

    opened = []
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *args, **kwargs: opened.append(args))
    large = png(900, 900)
    assert len(large) > 2_000_000
    assert page.ask("/api/search", {"images": [{"upload": 0}]}, [large]).status_code == 200
    assert opened == []


def test_a_message_keeps_its_words_beside_a_folder_of_a_common_name(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(made.gallery, tmp_path / "gallery")
    monkeypatch.chdir(tmp_path)
    with serving(service_of(made, with_models=False, gallery=Path("gallery"))) as page:
        shutil.rmtree("gallery")
        error = page.get("/api/state").json()["error"]
        assert "'personmae gallery build'" in error
        assert "it has no gallery.json" in error


def test_uploads_are_refused_once_the_gallery_is_of_another_model(made: Made, tmp_path: Path):
    shutil.copytree(made.gallery, tmp_path / "gallery")
    with serving(service_of(made, gallery=tmp_path / "gallery")) as page:
        manifest = tmp_path / "gallery" / store.MANIFEST
        content = json.loads(manifest.read_text())
        content["model"] = {"place": "/secret/run", "digest": "another"}
        manifest.write_text(json.dumps(content))
        answer = page.ask("/api/search", {"images": [{"upload": 0}]}, [made.image()])
        assert answer.status_code == 409
        assert "another model" in answer.json()["error"]
        assert "secret" not in answer.text
        assert str(made.run) not in answer.text
        assert page.ask("/api/search", SOME).status_code == 200


def test_a_model_that_breaks_leaves_no_other_one_loading_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    models = Models(lambda line: None)

    def broken() -> None:
        raise RuntimeError("a bug")

    models.load([(models.encoder, broken, False), (models.pretrained, broken, True)]).join()
    assert (models.encoder.state, models.pretrained.state) == ("failed", "failed")
