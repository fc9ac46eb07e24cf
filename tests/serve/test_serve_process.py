"""``personmae serve`` as a process: how it starts and ends, and what hostile uploads do to it."""

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import warm
from served import Made, ask, png, started
from test_uploaded_images import SVG, claimed_png

from personmae.commands import serve as verb
from personmae.errors import UserError
from personmae.serve import server

pytestmark = pytest.mark.integration
UPLOAD = {"images": [{"upload": 0}]}
MOST_GROWTH = 400_000_000  # bytes. 8 bodies of 10 MB, and one image of 24 million pixels on its way to RGB


@pytest.fixture(scope="module")
def running(made: Made) -> Iterator[tuple[warm.Process, str]]:
    with started(made.gallery, "--max-upload", "10") as (process, url):
        wait_for_model(url)
        yield process, url


def wait_for_model(url: str) -> None:
    for _ in range(600):
        if requests.get(f"{url}/api/state", timeout=60).json()["encoder"] == "ready":
            return
        threading.Event().wait(0.1)
    raise AssertionError("the model was never ready")


def memory(process: warm.Process, name: str) -> int:
    """A line of the kernel's about a process's memory, in bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# --- hostile uploads ---


@pytest.mark.slow
def test_hostile_uploads_are_refused_and_the_memory_stays_bounded(made: Made, running: tuple[warm.Process, str]):
    process, url = running
    assert ask(url, "/api/search", UPLOAD, [made.image()]).status_code == 200
    before = memory(process, "VmRSS")
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak is counted from here on
    hostile = [
        (bytes(50_000_000), "large.jpg", 413, "at most 10 MB"),
        (claimed_png(30_000, 30_000), "bomb.png", 413, "pixels"),
        (b"just a text\n" * 50, "text.jpg", 415, "a JPEG, PNG, WebP or BMP image is required"),
        (SVG, "script.svg", 415, "a JPEG, PNG, WebP or BMP image is required"),
        (made.image()[:900], "../../../../tmp/<script>alert(1)</script>.jpg", 422, "cannot be read"),
    ]
    for data, name, status, words in hostile:
        answer = ask(url, "/api/search", UPLOAD, [data], name=name)
        assert answer.status_code == status, name
        assert words in answer.json()["error"]
        assert "script" not in answer.text
    good = ask(url, "/api/search", UPLOAD, [made.image()], name="../../etc/passwd")
    assert good.status_code == 200
    assert "passwd" not in good.text

    large = png(1700, 1700)
    assert 8_000_000 < len(large) < 9_000_000
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda n: ask(url, "/api/search", UPLOAD, [made.image() if n % 4 else large]), range(100)))
    assert {answer.status_code for answer in answers} <= {200, 429, 503}
    assert sum(answer.status_code == 200 for answer in answers) >= 1
    assert all(answer.json()["error"] for answer in answers if answer.status_code != 200)
    assert memory(process, "VmHWM") - before < MOST_GROWTH
    assert process.poll() is None
    assert requests.get(f"{url}/api/state", timeout=60).json()["encoder"] == "ready"


# --- start and end ---


def test_the_page_is_there_before_torch_is():
    """Seconds would otherwise pass until a visitor sees anything."""
    code = "import sys; from personmae.serve import app, server; app.stylesheet(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(done.stdout.split())
    assert {"uvicorn", "fastapi", "numpy"} <= loaded
    assert loaded & {"torch", "matplotlib", "cv2", "scipy", "sklearn", "faiss"} == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_as_complete(made: Made, number: int):
    with started(made.gallery) as (process, url):
        assert requests.get(f"{url}/api/state", timeout=60).status_code == 200
        process.send_signal(number)
        assert process.wait(60) == 0


def serve(*arguments: str | Path, env: dict[str, str] | None = None) -> str:
    """The one line of an error, before any address is printed."""
    done = warm.run(["-m", "personmae", "serve", *arguments], env=env)
    assert (done.returncode, done.stdout) == (78, ""), done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in done.stderr
    return line


def test_what_cannot_be_served_ends_with_one_line(made: Made, tmp_path: Path):
    assert "a folder that 'personmae gallery build' made is required" in serve(tmp_path)
    assert "so a password is required" in serve(made.gallery, "--host", "0.0.0.0", "--port", "0")
    assert "must be a whole number from 0 to 65535" in serve(made.gallery, "--port", "70000")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1 port {port} cannot be used (Address already in use)" in serve(made.gallery, "--port", str(port))


def test_a_model_that_cannot_be_served_is_found_before_the_address_is_printed(made: Made, tmp_path: Path):
    def refused(*options: str | Path) -> str:
        return serve(made.gallery, "--port", "0", *options)

    for option in ("--model", "--pretrained"):
        assert f"is required as {option}. nope does not exist: correct the path" in refused(option, "nope")
    assert f"{tmp_path} holds none: correct the path" in refused("--model", tmp_path)
    assert f"{tmp_path} has no checkpoint: name a run of 'personmae pretrain'" in refused("--pretrained", tmp_path)
    assert "no decoder of pixels: name a run of 'personmae pretrain'" in refused("--pretrained", made.run)


def test_where_the_gallerys_own_model_was_moved_the_log_says_what_to_give(made: Made):
    moved = str(made.run.with_name("moved"))
    with pytest.raises(UserError, match=f"built with {moved}, which is not there any more. If it was moved, give --model RUN"):
        server._open_encoder(moved, server.Watched(made.gallery), server.Settings(made.gallery))


def test_a_gallery_whose_model_has_gone_is_served_without_uploads(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture):
    from personmae.serve.models import Models

    ended: list[int] = []
    models = Models(lambda line: print(line), end=lambda: ended.append(1))

    def fail() -> None:
        raise UserError("nothing is there: look")

    models.load([(models.encoder, fail, False)]).join()
    assert (models.encoder.state, models.error, ended) == ("failed", None, [])
    assert "uploads cannot be searched for: nothing is there: look" in capsys.readouterr().out
    models.load([(models.encoder, fail, True)]).join()
    assert (str(models.error), ended) == ("nothing is there: look", [1])


# --- passwords and addresses ---


def test_a_password_is_the_first_line_of_a_file_or_of_the_environment(tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "password"
    file.write_text("a long secret\r\nsomething else\n")
    file.chmod(0o600)
    assert server.read_password(file) == "a long secret"
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    assert server.read_password(file) == "a long secret"
    assert f"others can read {file}" in capsys.readouterr().err
    monkeypatch.delenv(server.PASSWORD, raising=False)
    assert server.read_password(None) is None
    monkeypatch.setenv(server.PASSWORD, "of the environment")
    assert server.read_password(None) == "of the environment"
    assert server.read_password(file) == "a long secret"
    monkeypatch.setenv(server.PASSWORD, "short")
    with pytest.raises(UserError, match=f"8 to 1000 printable ASCII characters.*{server.PASSWORD}"):
        server.read_password(None)
    for wrong in ("", "short\n", "pass\x07word", 1001 * "a"):
        file.write_text(wrong)
        with pytest.raises(UserError, match="8 to 1000 printable"):
            server.read_password(file)
    file.write_text("Schlüsselwörter")
    with pytest.raises(UserError, match="ASCII"):
        server.read_password(file)
    with pytest.raises(UserError, match="cannot be read"):
        server.read_password(tmp_path / "none")


@pytest.mark.parametrize(
    ("host", "is_safe"), [("127.0.0.1", True), ("localhost", True), ("127.0.0.2", True), ("0.0.0.0", False)]
)
def test_an_address_that_others_reach_needs_a_password(host: str, is_safe: bool):
    with server.listening(host, 0) as sock:
        server.require_safe(sock, server.Settings(Path("g"), host=host), "a password")
        server.require_safe(sock, server.Settings(Path("g"), host=host, no_password=True), None)
        if is_safe:
            server.require_safe(sock, server.Settings(Path("g"), host=host), None)
        else:
            with pytest.raises(UserError, match=r"other machines reach --host 0\.0\.0\.0, so a password is required"):
                server.require_safe(sock, server.Settings(Path("g"), host=host), None)


@pytest.mark.parametrize("host", ["203.0.113.7", "\x00"])
def test_an_address_that_is_not_here_is_refused(host: str):
    with pytest.raises(UserError), server.listening(host, 0):
        pass


def test_without_the_packages_the_verb_says_what_to_install(made: Made, monkeypatch: pytest.MonkeyPatch, capsys):
    from personmae.__main__ import main

    monkeypatch.setattr(verb.importlib.util, "find_spec", lambda name: None)
    assert main(["serve", str(made.gallery)]) == 78
    assert "pip install 'personmae[serve]'" in capsys.readouterr().err
