"""Pictures of ``personmae serve``: the page as a visitor sees it, wide and narrow, light and dark.

    python benchmarks/serve_pictures.py GALLERY --query IMAGE --pretrained RUN --out pictures    # a minute

It starts the page, searches with an upload, compares a result, and draws a mask. OUT has a picture of each step, such as
search-1400-light.png, and serve.png: that one in 256 colours, which is docs/serve.png. Needs playwright and a chromium.
"""

import argparse
import contextlib
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image

from personmae.errors import UserError, run_program

WIDTHS: Final = (1400, 420)
MODES: Final[tuple[Literal["light", "dark"], ...]] = ("light", "dark")
NARROW: Final = 800  # pixels of a window, in which a step is shown where the page has scrolled to
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gallery", type=Path)
    parser.add_argument("--query", type=Path, required=True, help="an image to upload")
    parser.add_argument("--pretrained", help="a pre-training run, for the reconstruction")
    parser.add_argument("--model", help="a run (default: what the gallery was built with)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    return run_program(lambda: take_all(args))


def take_all(args: argparse.Namespace) -> None:
    """Write all pictures."""
    from playwright.sync_api import sync_playwright

    args.out.mkdir(parents=True, exist_ok=True)
    with serving(args) as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        for width, mode in itertools.product(WIDTHS, MODES):
            context = browser.new_context(viewport={"width": width, "height": 1000 if width > 800 else 860}, color_scheme=mode)
            take(context.new_page(), url, args, f"{width}-{mode}")
            context.close()
        browser.close()
    write_small(args.out / "search-1400-light.png", args.out / "serve.png")


def write_small(path: Path, out: Path) -> None:
    """A picture in 256 colours, which halves its file."""
    with Image.open(path) as image:
        whole = image.convert("RGB")
    palette = whole.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    whole.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(out, optimize=True)


def chromium() -> str:
    found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise UserError("a chromium is required and there is none: on Debian, apt-get install chromium")
    return found


@contextlib.contextmanager
def serving(args: argparse.Namespace) -> Iterator[str]:
    """The address of the page while it is served."""
    options = [f"--{name}={value}" for name in ("model", "pretrained") if (value := vars(args)[name])]
    command = [sys.executable, "-m", "personmae", "serve", str(args.gallery), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if " at " not in line:
            raise UserError("the page did not start: see above")
        yield line.split(" at ")[1].strip()
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def take(tab: Any, url: str, args: argparse.Namespace, name: str) -> None:
    """The pictures of one width and mode."""
    tab.set_default_timeout(90_000)
    tab.goto(url)
    tab.wait_for_selector("#encoder-state:has-text('ready')")
    tab.wait_for_selector("#browse-search .picture")
    shot(tab, args.out / f"start-{name}.png")
    tab.set_input_files("#search-file", args.query)
    tab.click("#search-button")
    shot_of_all(tab, "#hits li", args.out / f"search-{name}.png")
    tab.locator("#hits .picture").nth(1).click()
    tab.wait_for_selector("#comparison[open] svg")
    shot(tab, args.out / f"compare-{name}.png")
    tab.keyboard.press("Escape")
    tab.click("text=Draw a box")
    for side, value in (("left", "10"), ("top", "12"), ("right", "90"), ("bottom", "60")):
        tab.fill(f"#box-{side}", value)
    shot(tab, args.out / f"box-{name}.png")
    tab.click("#box-done")
    if args.pretrained:
        tab.click("#tab-reconstruct")
        tab.wait_for_selector("#patches [role=gridcell]")
        tab.set_input_files("#reconstruct-file", args.query)
        tab.click("#predict")
        shot_of_all(tab, "#regions img", args.out / f"reconstruct-{name}.png")


def shot_of_all(tab: Any, awaited: str, path: Path) -> None:
    """The page once a selector is there, in a wide window from its top."""
    tab.wait_for_selector(awaited)
    if tab.viewport_size["width"] > NARROW:
        tab.evaluate("scrollTo(0, 0)")
    shot(tab, path)


def shot(tab: Any, path: Path) -> None:
    tab.wait_for_timeout(400)  # images are shown once they are decoded
    tab.screenshot(path=path)


if __name__ == "__main__":
    sys.exit(main())
