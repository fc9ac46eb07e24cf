"""``personmae visualise`` as a user types it, on runs with random weights: the page, its pictures, and what is refused."""

import html.parser
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import axe
import cv2
import numpy as np
import pytest
from saved_runs import copy

from personmae import evaluate
from personmae.__main__ import main
from personmae.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_USER_ERROR
from personmae.report import figures
from personmae.visualise import page
from personmae.visualise.section import TITLES, Drawing, Part, Section, attempt
from personmae.weights import stored

VOID = {"meta", "img", "link", "br"}


class Parsed(html.parser.HTMLParser):
    """Every element with its attributes. Each is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="session")
def written(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the fine-tuned run with all sections."""
    out = tmp_path_factory.mktemp("page") / "out"
    assert main(["visualise", str(tuned), "--out", str(out), "--queries", "2"]) == EXIT_COMPLETE
    return out


def record_of(out: Path) -> dict:
    return json.loads((out / "visualise.json").read_text())


def test_the_scores_on_the_page_are_the_results_own(written, tuned):
    recorded, result = record_of(written), json.loads((tuned / "result.json").read_text())
    for score in ("mAP", "rank1", "benchmark_digest", "num_valid", "num_gallery"):
        assert recorded[score] == result[score]
    text = (written / "index.html").read_text()
    assert f"<dd>{100 * result['mAP']:.1f} %</dd>" in text
    assert "This is the mAP of its result.json." in text
    assert "synthetic people, Market-1501 layout, 8 identities" in text


def test_the_page_needs_nothing_else_and_every_drawing_is_a_png(written):
    text = (written / "index.html").read_text()
    parsed = Parsed(text)
    addresses = [image["src"] or "" for image in parsed.all("img")]
    assert len(addresses) > 4 * 2 * 11
    assert all(address.startswith("data:image/") for address in addresses)
    assert re.findall(r"url\((?!#)", text) == []
    assert "@import" not in text
    assert parsed.all("script") == parsed.all("link") == []
    pngs = sorted(path.name for path in written.glob("*.png"))
    assert pngs == sorted(re.findall(r"<code>([\w-]+\.png)</code>", text))
    assert {name.partition("-")[0] for name in pngs} == set(TITLES) - {"reconstructions"}
    for name in pngs:
        image = cv2.imread(str(written / name))
        assert image is not None
        assert image.std() > 1
    assert sorted(record_of(written)["files"]) == sorted(["index.html", *pngs])


def test_every_picture_is_named_and_every_link_leads_somewhere(written):
    parsed = Parsed((written / "index.html").read_text())
    unnamed = [image for image in parsed.all("img") if not image["alt"]]
    assert all("left: " in (image.get("style") or "") for image in unnamed)  # of the map, which is named as a whole
    (placed,) = [div for div in parsed.all("div") if div.get("class") == "placed"]
    assert (placed["role"], placed["aria-label"]) == (
        "img",
        f"The map with {len(unnamed)} small images of people at their places",
    )
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in parsed.all("svg"))
    scrolling = [div for div in parsed.all("div") if "scroll" in (div.get("class") or "")]
    assert {(div["tabindex"], div["role"], bool(div["aria-label"])) for div in scrolling} == {("0", "region", True)}
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [(link["href"] or "").removeprefix("#") for link in parsed.all("a")]
    drawn = [name for name in TITLES if name != "reconstructions"]
    assert [*drawn, "reconstructions", "made"] == targets  # what is left out comes last
    assert set(targets) <= set(ids)


def test_frames_say_right_and_wrong_in_words_too(written):
    text = (written / "index.html").read_text()
    assert text.count('alt="The query"') == 4 * 2
    assert text.count('the same person"') + text.count('another person"') == 4 * 2 * 10
    assert "Red and\ncrossed" in text


def test_a_part_that_cannot_be_drawn_says_why(written):
    text = (written / "index.html").read_text()
    place = text.index("This part is left out: only a pre-training run can predict hidden patches")
    assert place > text.rindex('<div class="drawing">')  # a page begins with pictures


def test_frozen_features_are_those_of_evaluate_with_rows(pretrained, people, tmp_path):
    root = str(people / "market1501")
    evaluate.run(str(pretrained), "market1501", root, out=tmp_path / "rows", options=evaluate.Options(pool="rows"))
    out = tmp_path / "out"
    arguments = ["visualise", str(pretrained), "--benchmark", "market1501", "--data", root, "--out", str(out)]
    assert main([*arguments, "--sections", "ranks", "--queries", "1"]) == EXIT_COMPLETE
    expected = json.loads((tmp_path / "rows" / "result.json").read_text())
    assert record_of(out)["mAP"] == pytest.approx(expected["mAP"], abs=1e-9)
    text = (out / "index.html").read_text()
    assert "frozen features, no head" in text
    assert "rows of patch tokens" in text
    assert f"{100 * expected['mAP']:.1f} %" in text.replace("\u00a0", " ")
    assert set(re.findall(r'<h2 id="(\w+)"', text)) == {"ranks", "made"}


def test_a_run_that_was_evaluated_with_whitened_features_is_drawn_with_them(tuned, people, tmp_path):
    run = copy(tuned, tmp_path / "run", whiten={"dim": 8, "shrinkage": 0.3})
    evaluate.run(str(run), "market1501", str(people / "market1501"), out=run)
    plain, whitened = (json.loads((folder / "result.json").read_text())["mAP"] for folder in (tuned, run))
    assert main(["visualise", str(run), "--sections", "map"]) == EXIT_COMPLETE
    assert record_of(run / "visualise")["mAP"] == whitened != plain
    assert "whitened per camera" in (run / "visualise" / "index.html").read_text()


def test_an_exported_folder_needs_a_benchmark_and_is_then_the_run(tuned, people, tmp_path, capsys):
    (folder := tmp_path / "exported").mkdir()
    stored.write_folder(folder, stored.read(tuned))
    assert main(["visualise", str(folder)]) == EXIT_USER_ERROR
    assert "names no benchmark: give --benchmark NAME --data ROOT" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "personmae.json"]
    assert main(["evaluate", str(folder), "market1501", str(people / "market1501")]) == EXIT_USER_ERROR
    assert "is an exported folder: name the run it came from" in capsys.readouterr().err
    given = ["--benchmark", "market1501", "--data", str(people / "market1501"), "--sections", "ranks", "--queries", "1"]
    assert main(["visualise", str(folder), *given]) == EXIT_COMPLETE
    expected = json.loads((tuned / "result.json").read_text())["mAP"]
    assert record_of(folder / "visualise")["mAP"] == pytest.approx(expected, abs=1e-9)


def test_a_checkpoint_needs_another_place_and_stays_as_it_is(tuned, tmp_path, capsys):
    (checkpoint,) = copy(tuned, tmp_path / "run").glob("checkpoints/step-*")
    before = sorted(path.name for path in checkpoint.iterdir())
    assert main(["visualise", str(checkpoint)]) == EXIT_USER_ERROR
    assert "--out DIR is required for a checkpoint" in capsys.readouterr().err
    out = tmp_path / "out"
    assert main(["visualise", str(checkpoint), "--sections", "attention", "--out", str(out)]) == EXIT_COMPLETE
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_attention_alone_searches_for_nothing(tuned, tmp_path, capsys):
    assert main(["visualise", str(tuned), "--sections", "attention", "--out", str(tmp_path / "out")]) == EXIT_COMPLETE
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith("visualise: starting ...")
    assert "extracting" not in out
    assert "mAP" not in record_of(tmp_path / "out")
    assert "there are no scores" in (tmp_path / "out" / "index.html").read_text()


def test_the_same_command_again_replaces_its_own_page_and_nothing_else(tuned, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tuned, run)
    command = ["visualise", str(run), "--sections", "ranks", "--queries", "1"]
    assert main(command) == EXIT_COMPLETE
    assert main([*command, "--seed", "1"]) == EXIT_COMPLETE
    assert record_of(run / "visualise")["seed"] == 1
    (run / "visualise" / "mine.txt").write_text("mine")
    assert main(command) == EXIT_USER_ERROR
    assert "holds mine.txt beside it" in capsys.readouterr().err
    assert record_of(run / "visualise")["seed"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sections", "ranks,rnks"], "Got 'rnks'. Did you mean 'ranks'?"),
        (["--sections", ","], "Got none"),
        (["--benchmark", "market1501"], "--benchmark and --data belong together"),
        (["--seed", "-1"], "--seed must be a whole number from 0"),
        (["--queries", "0"], "must be a whole number above 0"),
        (["--table", "nowhere.csv", "--sections", "errors"], "nowhere.csv cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_written(tuned, tmp_path, capsys, arguments, words):
    out = tmp_path / "out"
    try:
        code = main(["visualise", str(tuned), "--out", str(out), *arguments])
    except SystemExit as end:
        code = end.code
    assert code == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_other_images_is_refused_before_anything_is_computed(tuned, tmp_path, capsys):
    table = tmp_path / "hidden.csv"
    table.write_text("id,occlusion\nnobody.jpg,0.5\n")
    out = tmp_path / "out"
    assert main(["visualise", str(tuned), "--out", str(out), "--table", str(table)]) == EXIT_USER_ERROR
    said = capsys.readouterr()
    assert "None of its 1 is" in said.err
    assert "mAP" not in said.out
    assert not out.exists()


def test_a_run_that_is_not_there_is_said_to_be_missing(tmp_path, capsys):
    assert main(["visualise", str(tmp_path / "typo")]) == EXIT_USER_ERROR
    assert f"{tmp_path / 'typo'} does not exist" in capsys.readouterr().err


def test_a_benchmark_that_has_moved_is_named(tuned, tmp_path, capsys):
    run = copy(tuned, tmp_path / "run", root=str(tmp_path / "gone"))
    assert main(["visualise", str(run)]) == EXIT_USER_ERROR
    assert f"is not at {tmp_path / 'gone'}: give --benchmark NAME --data ROOT" in capsys.readouterr().err
    assert not (run / "visualise").exists()


def test_an_image_that_is_gone_costs_its_section_and_the_exit_code_says_so(tuned, people, tmp_path, capsys, monkeypatch):
    def gone(path: Path, size: tuple[int, int]) -> None:
        raise OSError(2, "No such file or directory", str(path))

    monkeypatch.setattr(figures, "read_thumbnail", gone)
    out = tmp_path / "out"
    assert main(["visualise", str(tuned), "--sections", "ranks,errors", "--out", str(out)]) == EXIT_FAILED
    assert "incomplete: the page is written without 1 section" in capsys.readouterr().err
    text = (out / "index.html").read_text()
    assert "This part is left out: [Errno 2]" in text
    assert "mAP by pair of cameras" in text


def test_equal_titles_have_files_of_their_own():
    drawing = Drawing("query/A_1.jpg and B", "", "a picture", np.zeros((2, 2, 3), np.uint8))
    named = page.file_names([Section("ranks", Part("", [drawing, drawing, replace(drawing, title="…")])), Section("map")])
    assert named == [["ranks-a-1-and-b.png", "ranks-a-1-and-b-2.png", "ranks.png"], []]


def test_words_of_a_drawing_are_never_markup():
    drawing = Drawing("<b>", "a < b", '"quoted"', np.zeros((2, 2, 3), np.uint8))
    section = attempt("ranks", lambda: Part("<i>", [drawing]))
    context = {"title": "t", "tags": [], "summary": "s", "facts": [], "made": [], "counts": "", "light": (), "dark": ()}
    shown = {"name": "ranks", "title": section.title, "note": "<i>", "missing": "", "drawings": [page._shown(drawing, "x.png")]}
    text = page.render(sections=[shown], **context)
    assert "<b>" not in text
    assert "<i>" not in text
    assert 'alt="&#34;quoted&#34;"' in text


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("width", [1400, 420])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_axe_finds_nothing_in_pictures(written, tmp_path, width, mode):
    seen = axe.find((written / "index.html").read_text(encoding="utf-8"), tmp_path, width, mode)
    assert seen["passed"] > 10
    assert (seen["w"], seen["dark"]) == (width, mode == "dark")
    assert seen["wide"] <= width  # nothing but the named regions scrolls sideways
    assert seen["found"] == []
