"""A gallery of drawn people with the model that built it, the page served in a thread or a process, and forms for it."""

import contextlib
import io
import json
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests
import warm
from made_encoders import write_finetuning, write_pretraining
from people import draw_few_people
from PIL import Image

from personmae.gallery import edit
from personmae.serve import app, server
from personmae.serve.limits import Limits
from personmae.serve.models import Models
from personmae.serve.service import Service
from personmae.serve.watched import Watched

PATIENT = Limits(burst=10_000)  # tests ask more often than people


@dataclass(frozen=True)
class Made:
    """Where a gallery, its model, a pre-training and the images are."""

    gallery: Path
    run: Path
    pretrained: Path
    images: Path

    def image(self, place: int = 0) -> bytes:
        """The bytes of one of the images."""
        return sorted(self.images.glob("*.jpg"))[place].read_bytes()


def make(folder: Path) -> Made:
    """A gallery of a few drawn people with cameras and times, and models of random weights."""
    images = draw_few_people(folder, num_ids=6) / "market1501" / "bounding_box_test"
    run, (pretrained, _) = write_finetuning(folder / "run"), write_pretraining(folder / "pretrained")
    lines = [f"{path.name},{path.name.partition('_c')[2][0]},{10 * n}" for n, path in enumerate(sorted(images.glob("*.jpg")))]
    (folder / "facts.csv").write_text("\n".join(["id,camera,time", *lines]))
    edit.build(edit.Inputs(str(images), model=str(run), table=folder / "facts.csv"), folder / "gallery")
    return Made(folder / "gallery", run, pretrained, images)


# --- the page ---


@dataclass(frozen=True)
class Page:
    """A page that is served at ``url``, without a slash at its end."""

    url: str
    service: Service

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(f"{self.url}{path}", timeout=60, **options)

    def ask(self, path: str, request: Any, images: Sequence[bytes] = (), **options: Any) -> requests.Response:
        """Send a form as the page does."""
        return ask(self.url, path, request, images, **options)


def ask(
    url: str, path: str, request: Any, images: Sequence[bytes] = (), *, name: str = "image", headers: Any = None, **options: Any
) -> requests.Response:
    parts: list[Any] = [("request", (None, json.dumps(request)))] + [("image", (name, data, "image/jpeg")) for data in images]
    sent = {"Origin": url} if headers is None else headers
    return requests.post(f"{url}{path}", files=parts, headers=sent, timeout=60, **options)


def service_of(made: Made, limits: Limits = PATIENT, *, with_models: bool = True, gallery: Path | None = None) -> Service:
    """A service whose models are loaded already."""
    models = Models(lambda line: None)
    service = Service(Watched(gallery or made.gallery), models, limits)
    if with_models:
        from personmae.explain.reconstruction import open_pretrained
        from personmae.weights.encoder import load

        wanted = [
            (models.encoder, lambda: load(made.run), True),
            (models.pretrained, lambda: open_pretrained(made.pretrained), True),
        ]
        models.load(wanted).join()
    return service


@contextlib.contextmanager
def serving(service: Service, *, password: str | None = None, hosts: Any = ("localhost",)) -> Iterator[Page]:
    """The page by the program's own server, in a thread."""
    with server.listening("127.0.0.1", 0) as sock:
        application = app.build(service, name="gallery", password=password, hosts=hosts)
        running = server.Server(server.config_of(application, service.limits))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield Page(f"http://127.0.0.1:{sock.getsockname()[1]}", service)
        finally:
            running.end()
            thread.join(timeout=60)
            assert not thread.is_alive()


@contextlib.contextmanager
def started(*arguments: str | Path) -> Iterator[tuple[warm.Process, str]]:
    """``personmae serve`` as a process, and its address."""
    process = warm.start(["-m", "personmae", "serve", *arguments, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield process, line.split(" at ")[1].strip().removesuffix("/")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()


def png(height: int, width: int, seed: int = 0) -> bytes:
    """A file of noise."""
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
