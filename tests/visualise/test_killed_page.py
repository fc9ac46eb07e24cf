"""A real process that is killed while it draws: the earlier page stays whole, and the next call goes its way."""

import json
import signal
import time

import pytest
import warm

from personmae.errors import EXIT_COMPLETE, EXIT_STOPPED

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, EXIT_STOPPED)])
def test_an_end_in_the_middle_leaves_the_earlier_page(tuned, tmp_path, number, code):
    out = tmp_path / "out"
    arguments = ["-m", "personmae", "visualise", tuned, "--out", out, "--queries", "1"]
    assert warm.run([*arguments, "--sections", "ranks"], timeout=300).returncode == EXIT_COMPLETE
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with (tmp_path / "log").open("w") as log:
        process = warm.start([*arguments, "--seed", "1"], stdout=log, stderr=log)
        while process.poll() is None and "mAP" not in (tmp_path / "log").read_text():
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() == code
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert warm.run([*arguments, "--sections", "ranks", "--seed", "2"], timeout=300).returncode == EXIT_COMPLETE
    assert json.loads((out / "visualise.json").read_text())["seed"] == 2
    assert not (tmp_path / "out.partial").exists()
