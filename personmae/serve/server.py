"""``personmae serve``: where it listens, who may see it, and how it ends."""

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from personmae.errors import UserError
from personmae.monitor.progress import counted, log_to_stderr
from personmae.serve import app
from personmae.serve.limits import Limits
from personmae.serve.models import Models
from personmae.serve.service import Service
from personmae.serve.watched import Watched

PASSWORD: Final = "PERSONMAE_SERVE_PASSWORD"
_SHORTEST, _LONGEST = 8, 1000  # characters of a password, and a browser has to fit it into a header
_OPTIONS: Final[dict[str, Any]] = {
    "loop": "asyncio",
    "ws": "none",
    "lifespan": "off",
    "log_config": None,
    "access_log": False,  # a line would hold what was searched for
    "server_header": False,
    "proxy_headers": False,  # anybody can write such a header
    "limit_concurrency": 256,
    "timeout_keep_alive": 15,
    "timeout_graceful_shutdown": 5,
    "h11_max_incomplete_event_size": 16_384,
}


@dataclass(frozen=True)
class Settings:
    """What the command line asks for. ``model`` is None for that of the gallery. ``most_bytes`` of an upload."""

    gallery: Path
    model: str | None = None
    pretrained: str | None = None
    host: str = "127.0.0.1"
    port: int = 8765
    password_file: Path | None = None
    no_password: bool = False
    most_bytes: int = Limits.body
    unfinished: bool = False


def run(settings: Settings) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        UserError: there is no such gallery or model, the address cannot be used, or strangers could use it.
    """
    watched, password = Watched(settings.gallery), read_password(settings.password_file)
    require_models(settings)
    with listening(settings.host, settings.port) as sock:
        require_safe(sock, settings, password)
        limits = Limits(body=settings.most_bytes)
        models = Models(_log, end=lambda: running.end())
        service = Service(watched, models, limits)
        hosts = None if password else names_of(settings.host)
        name = settings.gallery.resolve().name
        running = Server(config_of(app.build(service, name=name, password=password, hosts=hosts), limits))
        _load(settings, watched, models)
        print(_greeting(sock, settings.host, len(watched.now().gallery)), flush=True)
        running.run(sockets=[sock])
    if models.error:
        raise models.error


def _log(line: str) -> None:
    log_to_stderr(f"serve: {line}")


def _greeting(sock: socket.socket, host: str, num_images: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"{counted(num_images, 'image')} at http://{shown}:{sock.getsockname()[1]}/\nCtrl-C ends it"


# --- models ---


def _load(settings: Settings, watched: Watched, models: Models) -> None:
    """Load what is asked for, while the page is served already."""
    wanted: list[tuple[Any, Callable[[], Any], bool]] = []
    place = settings.model or (watched.now().gallery.manifest.model or {}).get("place")
    if place:
        wanted.append((models.encoder, lambda: _open_encoder(place, watched, settings), settings.model is not None))
    else:
        _log("the gallery does not name its model, so uploads cannot be searched for: give --model RUN")
    if settings.pretrained:
        wanted.append((models.pretrained, lambda: _open_pretrained(str(settings.pretrained)), True))
    models.load(wanted)


def require_models(settings: Settings) -> None:
    """Check what is asked for, as far as that takes no tensor: an address is printed only for a page that stays.

    Raises:
        UserError: there is no model at a place, or it has no decoder.
    """
    for option, place in (("--model", settings.model), ("--pretrained", settings.pretrained)):
        if place and not place.startswith("timm:") and not os.path.exists(place):
            raise UserError(f"a run or a checkpoint is required as {option}. {place} does not exist: correct the path")
    if settings.model and os.path.isdir(settings.model):
        _require_weights(settings.model)
    if settings.pretrained:
        from personmae.explain import reconstruction

        reconstruction.require_decoder(settings.pretrained)


def _require_weights(place: str) -> None:
    from personmae.checkpoint import portable
    from personmae.weights import stored

    if not any(Path(place, name).is_file() for name in (stored.DESCRIPTION, portable.MANIFEST)) and not portable.folders(place):
        raise UserError(f"a run or a checkpoint is required as --model. {place} holds none: correct the path")


def _open_encoder(place: str, watched: Watched, settings: Settings) -> Any:
    if not settings.model and not place.startswith("timm:") and not os.path.exists(place):
        raise UserError(f"the gallery was built with {place}, which is not there any more. If it was moved, give --model RUN")
    from personmae.gallery import search
    from personmae.weights.loading import load_for_command

    encoder = load_for_command(place, _log, unfinished=settings.unfinished)
    search.require_model(watched.now().gallery, encoder)
    return encoder


def _open_pretrained(place: str) -> Any:
    from personmae.explain import reconstruction

    return reconstruction.open_pretrained(place)


# --- who may see it ---


def read_password(file: Path | None) -> str | None:
    """The password of a file's first line, or of the environment. None where there is none.

    Raises:
        UserError: it cannot be read, or it is no password.
    """
    where = str(file) if file else PASSWORD
    try:
        text = file.read_text(encoding="ascii").split("\n")[0].strip("\r") if file else os.environ.get(PASSWORD)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"a file with a password of ASCII characters is required. {file} cannot be read: {error}") from error
    if text is None:
        return None
    if not _SHORTEST <= len(text) <= _LONGEST or not text.isascii() or not text.isprintable():
        raise UserError(f"a password of {_SHORTEST} to {_LONGEST} printable ASCII characters is required. Fix that of {where}")
    if file and stat.S_IMODE(file.stat().st_mode) & 0o077:
        _log(f"others can read {file}: chmod 600 {file}")
    return text


def require_safe(sock: socket.socket, settings: Settings, password: str | None) -> None:
    """Raise a UserError where other machines could see the gallery without a password."""
    if password or settings.no_password or ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback:
        return
    raise UserError(
        f"other machines reach --host {settings.host}, so a password is required: give --password-file FILE, set {PASSWORD}, "
        "or say --no-password"
    )


def names_of(host: str) -> list[str]:
    """The names by which a page without a password may be called. An address is always one."""
    return ["localhost", socket.gethostname(), host]


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at a host and port. Port 0 is any that is free.

    Raises:
        UserError: there is no such address here, or the port is taken or not allowed.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, ValueError) as error:
        raise UserError(f"a name or an address of this machine is required as --host. {host} is none: {error}") from error
    with socket.socket(family, kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(128)
        except OSError as error:
            raise UserError(
                f"an address of this machine and a free port are required. {host} port {port} cannot be used "
                f"({error.strerror}): give another --host or --port. Port 0 is any that is free"
            ) from error
        yield sock


# --- uvicorn ---


def config_of(application: Any, limits: Limits) -> uvicorn.Config:
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a damaged form is answered, and no line is owed
    patient = type("Patient", (_Patient,), {"header_seconds": limits.header_seconds})
    return uvicorn.Config(application, http=patient, log_level="error", **_OPTIONS)


class _Patient(H11Protocol):
    """Closes a connection that does not send a whole request line with its headers in time."""

    header_seconds = Limits.header_seconds
    _timer: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """Start the clock where a request is waited for, and stop it where one is there."""
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting and self._timer is None:
            self._timer = self.loop.call_later(self.header_seconds, self.transport.close)
        elif not is_waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()


class Server(uvicorn.Server):
    """A server that a signal ends as it should: a page that was served for as long as it was wanted is complete."""

    def end(self) -> None:
        """End at the next turn. Any thread may call it."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Answer signals while it serves. Uvicorn's own would send them again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kept = {number: signal.signal(number, self._answer) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        self.handle_exit(number, frame)
