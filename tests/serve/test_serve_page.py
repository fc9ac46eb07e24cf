"""The page in a browser, as a visitor uses it: with a mouse and with the keyboard, wide and narrow, light and dark."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import Made, Page, png, service_of, serving

from personmae.serve import asked

pytestmark = [pytest.mark.integration, pytest.mark.slow]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if not found:
        pytest.skip("no chromium here; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextlib.contextmanager
def visit(browser: Any, page: Page, *, width: int = 1400, **options: Any) -> Iterator[Any]:
    """A visitor's page. Whatever the page reports to the console is an error."""
    context = browser.new_context(viewport={"width": width, "height": 1000}, **options)
    tab, reported = context.new_page(), []
    tab.on("console", lambda message: reported.append(message.text))
    tab.on("pageerror", lambda error: reported.append(str(error)))
    tab.set_default_timeout(30_000)
    try:
        tab.goto(page.url)
        tab.wait_for_selector("#browse-search .picture")
        yield tab
        assert [text for text in reported if "the server responded with a status" not in text] == []
    finally:
        context.close()


def text(tab: Any, selector: str) -> str:
    return tab.locator(selector).inner_text()


def search(tab: Any) -> list[str]:
    """Press the button, and the ids that are shown then."""
    with tab.expect_response("**/api/search"):
        tab.click("#search-button")
    tab.wait_for_selector("#results:not([hidden]) #hits li")
    return tab.locator("#hits .id").all_inner_texts()


def test_upload_box_search_overlay_and_a_drawn_mask(browser: Any, made: Made, page: Page, tmp_path: Path):
    image = sorted(made.images.glob("*.jpg"))[2]
    with visit(browser, page) as tab:
        assert tab.is_disabled("#search-button")
        tab.set_input_files("#search-file", image)
        whole = search(tab)
        assert whole[0] == image.name  # the same image is in the gallery
        assert "20 images of" in text(tab, "#results-note")

        tab.click("text=Draw a box")
        tab.locator("#box-stage").scroll_into_view_if_needed()
        stage = tab.locator("#box-stage").bounding_box()
        tab.mouse.move(stage["x"] + 0.2 * stage["width"], stage["y"] + 0.5 * stage["height"])
        tab.mouse.down()
        tab.mouse.move(stage["x"] + 0.8 * stage["width"], stage["y"] + 0.9 * stage["height"], steps=4)
        tab.mouse.up()
        sides = [tab.input_value(f"#box-{side}") for side in ("left", "top", "right", "bottom")]
        assert [float(side) for side in sides] == pytest.approx([20, 50, 80, 90], abs=2)
        tab.click("#box-done")
        assert tab.is_hidden("#box-editor")
        assert search(tab) != whole

        with tab.expect_response("**/api/compare") as reply:
            tab.locator("#hits .picture").nth(1).click()
        tab.wait_for_selector("#comparison[open] svg")
        matches = reply.value.json()["matches"]
        assert tab.locator("#pair circle").count() == 2 * len(matches) > 2
        assert tab.locator("#matches li").count() == len(matches)
        assert "small copies" in text(tab, "#comparison-note")
        tab.locator("#matches button").first.focus()
        assert tab.locator("#pair .dimmed").count() == 2 * (len(matches) - 1)  # a line, and the dots
        tab.keyboard.press("Escape")
        assert tab.is_hidden("#comparison")

        tab.click("#tab-reconstruct")
        tab.wait_for_selector("#patches [role=gridcell]")
        tab.locator("#browse-reconstruct .picture").nth(3).click()
        tab.click("#mask-clear")
        assert tab.is_disabled("#predict")
        grid = tab.locator("#patches").bounding_box()
        tab.mouse.move(grid["x"] + 0.4 * grid["width"], grid["y"] + 0.03 * grid["height"])
        tab.mouse.down()
        tab.mouse.move(grid["x"] + 0.4 * grid["width"], grid["y"] + 0.97 * grid["height"], steps=20)
        tab.mouse.up()
        assert text(tab, "#mask-count") == "8 of 32 patches hidden"
        with tab.expect_response("**/api/reconstruct") as reply:
            tab.click("#predict")
        tab.wait_for_selector("#figure:not([hidden]) img")
        assert [name.strip() for name in tab.locator("#regions figcaption").all_inner_texts()] == [
            *("RegionA", "What the encoder sees", "Prediction of RegionB", "RegionB, the target"),
        ]
        assert "8 of 32 patches are hidden" in text(tab, "#figure-note")
        assert "nothing of the target is used" in text(tab, "#figure-note")
        mask = tab.evaluate("[...document.querySelectorAll('[role=gridcell]')].map(c => c.ariaSelected === 'true')")
        assert [number for number, hidden in enumerate(mask) if hidden] == list(range(1, 32, 4))
        assert reply.value.json()["words"] in text(tab, "#figure-note")


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All forms that the server gets."""
    read, seen = asked._form, []

    async def form(*arguments: Any) -> Any:
        seen.append(await read(*arguments))
        return seen[-1]

    monkeypatch.setattr(asked, "_form", form)
    return seen


def test_everything_can_be_done_with_the_keyboard(browser: Any, made: Made, page: Page, forms: list[Any]):
    with visit(browser, page) as tab:
        tab.locator("#browse-search .picture").nth(4).focus()
        tab.keyboard.press("Enter")
        assert tab.locator("#browse-search [aria-pressed=true]").count() == 1
        tab.set_input_files("#search-file", sorted(made.images.glob("*.jpg"))[0])
        assert tab.locator("#chosen li").count() == 2
        tab.get_by_role("button", name=re.compile("Draw a box")).focus()
        tab.keyboard.press("Enter")
        playwright.expect(tab.locator("#box-left")).to_be_focused()
        for side, value in (("left", "10"), ("top", "20"), ("right", "90"), ("bottom", "60")):
            tab.fill(f"#box-{side}", value)
        tab.focus("#box-done")
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.activeElement.id") == "search-button"
        with tab.expect_response("**/api/search"):
            tab.keyboard.press("Enter")
        (sent,) = forms
        row, upload = json.loads(sent["request"])["images"]
        assert list(row) == ["key", "id"]
        assert upload == {"upload": 0, "box": {"left": 0.1, "top": 0.2, "right": 0.9, "bottom": 0.6}}
        assert [file.filename for file in sent.getlist("image")] == ["image"]  # a file's own name stays with the visitor
        tab.wait_for_selector("#hits li")
        assert tab.evaluate("document.activeElement.id") == "results-title"

        tab.focus("#tab-search")
        tab.keyboard.press("ArrowRight")
        assert tab.evaluate("document.activeElement.id") == "tab-reconstruct"
        tab.wait_for_selector("#patches [role=gridcell]")
        tab.click("#mask-clear")
        tab.locator("#browse-reconstruct .picture").first.focus()
        tab.keyboard.press("Enter")
        tab.locator("[role=gridcell]").first.focus()
        for key in ("ArrowDown", "ArrowRight", "Space", "End", "Enter"):
            tab.keyboard.press(key)
        hidden = tab.locator("[role=gridcell][aria-selected=true]")
        labels = [hidden.nth(place).get_attribute("aria-label") for place in range(hidden.count())]
        assert labels == ["row 2, column 2, hidden", "row 2, column 4, hidden"]


def test_what_is_no_image_is_refused_with_words(browser: Any, page: Page):
    with visit(browser, page) as tab:
        assert tab.evaluate("document.body.dataset.mostBytes") == "10000000"
        tab.evaluate("document.body.dataset.mostBytes = 100000")
        for name, kind, data, words in (
            ("text.jpg", "image/jpeg", b"no image", "no image that can be shown"),
            ("a.svg", "image/svg+xml", b"<svg/>", "a JPEG, PNG, WebP or BMP image is required"),
            ("large.png", "image/png", bytes(200_000), "at most 0.1 MB"),
        ):
            tab.set_input_files("#search-file", {"name": name, "mimeType": kind, "buffer": data})
            playwright.expect(tab.locator("#problem")).to_contain_text(words, ignore_case=True)
            assert tab.locator("#chosen li").count() == 0


def test_an_image_can_be_dropped_on_the_page(browser: Any, page: Page):
    drop = """(data) => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(data)], "dropped.png", {type: "image/png"}));
        document.getElementById("search-drop").dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true}));
    }"""
    with visit(browser, page) as tab:
        tab.evaluate(drop, list(png(64, 32)))
        assert tab.locator("#chosen li").count() == 1
        assert len(search(tab)) == 20


def test_who_was_removed_is_said_to_be_gone(browser: Any, made: Made, tmp_path: Path):
    from personmae.gallery import edit

    shutil.copytree(made.gallery, tmp_path / "gallery")
    with serving(service_of(made, gallery=tmp_path / "gallery")) as page, visit(browser, page) as tab:
        tile = tab.locator("#browse-search .picture").first
        name = tile.get_attribute("title")
        tile.click()
        edit.remove(tmp_path / "gallery", [name])
        tab.click("#search-button")
        tab.wait_for_selector("#problem:not([hidden])")
        assert "is not in the gallery any more" in text(tab, "#problem")


@pytest.mark.parametrize("width", [1400, 420])
def test_names_of_any_kind_are_text_and_no_small_copy_is_no_broken_picture(
    browser: Any, made: Made, tmp_path: Path, width: int
):
    from personmae.gallery import edit
    from personmae.gallery.catalog import open_gallery

    ids, cameras = ["<img src=x onerror=alert(1)>", "\u202egpj.exe", "c" * 240], ["<b>1</b>", "\u202e2", "3" * 300]
    np.save(tmp_path / "some.npy", open_gallery(made.gallery).features(np.arange(3)))
    (tmp_path / "some.ids.txt").write_text("".join(f"{name}\n" for name in ids))
    (tmp_path / "facts.csv").write_text("\n".join(["id,camera", *map(",".join, zip(ids, cameras, strict=True))]))
    edit.build(edit.Inputs(str(tmp_path / "some.npy"), table=tmp_path / "facts.csv"), tmp_path / "gallery")
    with serving(service_of(made, gallery=tmp_path / "gallery")) as page, visit(browser, page, width=width) as tab:
        tab.locator("#browse-search .picture").first.click()
        assert tab.locator("#chosen img").count() == 0
        assert text(tab, "#chosen .frame") == "no small copy is kept"
        assert set(search(tab)) == set(ids[1:])
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        with tab.expect_response("**/api/rows?*"):
            tab.select_option("#browse-search-camera", cameras[2])
        tab.wait_for_selector("#browse-search .rows li:only-child")
        tab.click("#tab-reconstruct")
        tab.wait_for_selector("#patches [role=gridcell]")
        tab.locator("#browse-reconstruct .picture").first.click()
        assert "keeps no small copy" in text(tab, "#problem")
        assert tab.locator("#patches img").count() == 0
        tab.click("#tab-search")
        assert not tab.locator("#problem").is_visible()


@pytest.mark.parametrize("width", [1400, 420])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_scrolls_sideways(browser: Any, made: Made, page: Page, width: int, mode: str):
    axe = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    script = files(axe).joinpath("axe.min.js").read_text(encoding="utf-8")
    with visit(browser, page, width=width, color_scheme=mode, reduced_motion="reduce") as tab:
        tab.evaluate(script)

        def check(where: str) -> None:
            found = tab.evaluate("axe.run().then(r => [r.violations.map(v => `${v.id} ${v.nodes[0].html}`), r.passes.length])")
            assert found[0] == [], where
            assert found[1] > 15
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, where

        check("start")
        tab.set_input_files("#search-file", sorted(made.images.glob("*.jpg"))[2])
        tab.click("text=Draw a box")
        search(tab)
        check("results")
        tab.locator("#hits .picture").nth(1).click()
        tab.wait_for_selector("#comparison[open] svg")
        check("comparison")
        tab.keyboard.press("Escape")
        tab.click("#tab-reconstruct")
        tab.wait_for_selector("#patches [role=gridcell]")
        tab.locator("#browse-reconstruct .picture").first.click()
        with tab.expect_response("**/api/reconstruct"):
            tab.click("#predict")
        tab.wait_for_selector("#figure:not([hidden]) img")
        check("reconstruction")
