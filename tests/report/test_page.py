"""The page for everybody: its words and roles, and what axe finds in a browser."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import axe
import cv2
import numpy as np
import pytest
from made_runs import MakeRun, write_training

from personmae import config
from personmae.report import report
from personmae.report.runs import find_runs

MEASURED = {  # what records have had since there were camera pairs and latency
    "camera_pairs": {
        "query_cameras": [1, 2, 3],
        "gallery_cameras": [1, 2, 3],
        "mAP": [[None, 0.1, 0.2], [0.3, None, 0.4], [0.5, 0.6, None]],
        "rank1": [[None, 0.1, 0.2], [0.3, None, 0.4], [0.5, 0.6, None]],
        "num_queries": [[0, 1, 2], [3, 0, 4], [5, 6, 0]],
    },
    "latency": {
        "milliseconds": 5.04,
        "images_per_second": 310.0,
        "batch_size": 32,
        "precision": "fp32",
        "device": "cpu",
        "threads": 2,
        "hardware": {"cpu": "a <processor>"},
    },
}
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Every element with its attributes and the names of those around it, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), list(self._open)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), list(self._open)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


@pytest.fixture
def written(make_run: MakeRun, tmp_path: Path) -> Path:
    """A page with all its parts but Figure 3: two data sets, seeds, rank lists, an unfinished run."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(12):
        cv2.imwrite(str(root / f"{i:02}.jpg"), np.full((80, 40, 3), 20 * i, np.uint8))
    settings = config.Pretrain.model_validate(
        {"run_dir": "pretrain", "data": {"shards": "s3://b/s"}, "train": {"total_steps": 60}}
    )
    write_training(tmp_path / "pretrain", settings, step=30, total=60)
    shutil.rmtree(tmp_path / "pretrain" / "checkpoints")
    for seed in (0, 1):
        make_run(f"finetune_random_s{seed}", ap=[0.1, 0.2, 0.3, 0.4], overrides={"seed": seed})
    for name in ("finetune_personmae", "finetune_unfinished"):
        step = 40 if name == "finetune_personmae" else 20
        folder = make_run(name, init="pretrain", ap=[0.4, 0.3, 0.2, 0.5], step=step, **MEASURED)
        entry = {"query": "00.jpg", "gallery": [f"{g:02}.jpg" for g in range(1, 11)], "correct": [True] + 9 * [False]}
        (folder / "rank_lists.json").write_text(json.dumps({"root": str(root), "entries": [entry]}))
    make_run("elsewhere", init=None, benchmark_digest="e" * 16, benchmark_title="Market-1501", synthetic=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "count_shards", lambda _: "no store here")
        return report.run(tmp_path)


def test_every_image_region_and_table_is_named(written: Path) -> None:
    page = Page(written.read_text(encoding="utf-8"))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("header")) == 1
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    images = page.all("img")
    alts = [image["alt"] for image in images]
    assert len(images) == 11
    assert alts[:3] == ["Query 1", "Rank 1: the same person", "Rank 2: another person"]
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    scrolling = [div for div in page.all("div") if "scroll" in (div.get("class") or "")]
    assert len(scrolling) > 4
    assert {(div["tabindex"], div["role"], bool(div["aria-label"])) for div in scrolling} == {("0", "region", True)}
    assert all(around[-1] == "div" for tag, _, around in page.elements if tag == "table")  # each is in one of them
    assert {cell.get("scope") for cell in page.all("th")} == {"row", "col"}
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [attributes["aria-labelledby"] for _, attributes, _ in page.elements if "aria-labelledby" in attributes]
    targets = [(link["href"] or "").removeprefix("#") for link in page.all("a")]
    assert set(named) | set(targets) <= set(ids)


def test_only_what_is_named_scrolls() -> None:
    sheet = Path(report.__file__).with_name("report.css.j2").read_text(encoding="utf-8")
    assert re.findall(r"([.\w]+) \{[^}]*overflow-x: auto", sheet) == [".scroll"]
    assert "prefers-color-scheme: dark" in sheet


def test_the_page_says_how_far_and_which_data(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    for output in (
        "unfinished: step 20 of 40",
        "unfinished, step 30 of 60",
        "synthetic people, Market-1501 layout, 300 identities",
        "2 tables here are in the layout market1501.",
        "(25.0-25.0, 2 seeds)",
        "of 4 queries, worse in 1",
        "Fine-tuned: PersonMAE (one seed) compared with random weights (2 seeds).",
        "Shown, but compared with nothing: finetune_unfinished (unfinished).",
        "Highest from camera 3 to 2 with 60.0 %",
        "All on a &lt;processor&gt;, 2 threads, fp32, batches of 32.",
        "Each model on each benchmark",
        "in-domain",
        "elsewhere market1501 gone --out",
    ):
        assert output in text


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("width", [1400, 420])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_axe_finds_nothing(written: Path, tmp_path: Path, width: int, mode: str) -> None:
    seen = axe.find(written.read_text(encoding="utf-8"), tmp_path, width, mode)
    assert seen["passed"] > 15
    assert (seen["w"], seen["dark"]) == (width, mode == "dark")
    assert seen["wide"] <= width  # nothing but the named regions scrolls sideways
    assert seen["found"] == []


def test_the_same_data_is_counted_once_wherever_its_runs_saw_it(make_run: MakeRun, tmp_path: Path) -> None:
    for name, root, other in (("a", "/here", {}), ("b", "/there", {}), ("c", "/there", {"benchmark_digest": "e" * 16})):
        make_run(name, root=root, **other)
    title = "synthetic people, Market-1501 layout, 300 identities"
    assert [what for what, _ in report.data_counts(find_runs(tmp_path))] == [f"{title}: /here", f"{title}: /there"]
