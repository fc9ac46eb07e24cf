"""What axe finds on a page in a browser without a window."""

import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

_RUN = """axe.run().then(r => parent.postMessage({
    w: innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches, wide: document.documentElement.scrollWidth,
    found: r.violations.map(v => `${v.impact} ${v.id} ${v.nodes[0].html}`), passed: r.passes.length}, "*"))"""


def find(text: str, tmp_path: Path, width: int, mode: str) -> dict[str, Any]:
    """The width and mode in which a page was seen, how wide it is, how much ``passed``, and the violations ``found``.

    ``mode`` is light or dark. Skips the test where there is no browser.
    """
    browser = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if not browser:
        pytest.skip("no chromium here; on Debian: apt-get install chromium")
    axe = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    script = files(axe).joinpath("axe.min.js").read_text(encoding="utf-8")
    page = text.replace("</body>", f"<script>{script}</script><script>{_RUN}</script></body>")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "frame.html").write_text(  # a window is never narrower than 500 pixels, a frame is
        f'<body><iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
        "<script>onmessage = e => document.body.innerText = JSON.stringify(e.data)</script></body>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,1000", "--virtual-time-budget=60000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files"]
    options += [f"--blink-settings=preferredColorScheme={0 if mode == 'dark' else 1}"]
    done = subprocess.run([browser, *options, "--dump-dom", (tmp_path / "frame.html").as_uri()], capture_output=True, text=True)
    output = re.search(r"<body>({.*})</body>", done.stdout)
    assert output, done.stderr
    return json.loads(output[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
