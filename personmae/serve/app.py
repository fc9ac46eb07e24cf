"""The web application: a page, its files, and what the page asks for. No file of the server has a route."""

import asyncio
import contextlib
import functools
import math
import secrets
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Annotated, Any, Final, TypeVar

import jinja2
from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBasic
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from personmae.serve import asked
from personmae.serve.gate import Gate, Guard, client_of
from personmae.serve.limits import Limits, Rates, Refusal, later
from personmae.serve.service import Service

_SCRIPTS: Final = ("page.js", "parts.js", "browse.js", "queries.js", "search.js", "compare.js", "reconstruct.js")
_FAILED: Final = "something failed in the server: its output says what"
_MOST_PAGES: Final = 1_000_000
_LONGEST: Final = 4000  # characters of a name of a camera, or of a part of an id
Kind = TypeVar("Kind", bound=Any)


def build(service: Service, *, name: str, password: str | None = None, hosts: Iterable[str] | None = None) -> ASGIApp:
    """The application for a gallery called ``name``. ``hosts`` are the names by which it may be called, None for any."""
    limits = service.limits
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_errors(app)
    _add_page(app, service, name)
    _add_gallery(app, service)
    _add_work(app, service)
    return Gate(app, limits, hosts, _guard(password, limits) if password else None)


def _guard(password: str, limits: Limits) -> Guard:
    """What lets through who knows the password. The name is not looked at."""
    rates, expected = Rates(limits.passwords, 1 / limits.password_seconds), password.encode()
    read = HTTPBasic(auto_error=False)

    async def require_password(request: Request) -> None:
        client, given = client_of(request.scope), None
        if wait := rates.wait(client):
            raise later(429, f"too many wrong passwords: wait {math.ceil(wait)} s", wait)
        with contextlib.suppress(HTTPException):  # a header that holds no password
            given = await read(request)
        if given and secrets.compare_digest(given.password.encode(), expected):
            return
        if given:
            rates.take(client)
        raise Refusal(401, "a password is required", {"WWW-Authenticate": 'Basic realm="personmae", charset="UTF-8"'})

    return require_password


def _add_errors(app: FastAPI) -> None:
    """Every error is one line of JSON."""

    @app.exception_handler(Refusal)
    def refused(_: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(HTTPException)
    def unknown(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 422)

    @app.exception_handler(ClientDisconnect)
    def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": _FAILED}, 500)


# --- the page and its files ---


def _add_page(app: FastAPI, service: Service, name: str) -> None:
    @app.get("/", response_class=HTMLResponse)
    def page() -> HTMLResponse:
        return HTMLResponse(page_html(service, name))

    @app.get("/static/page.css")
    def style() -> Response:
        return Response(stylesheet(), media_type="text/css")

    for script in _SCRIPTS:
        app.get(f"/static/{script}")(functools.partial(_script, _read(script)))


def _script(text: str) -> Response:
    return Response(text, media_type="text/javascript")


def page_html(service: Service, name: str) -> str:
    """The page of a gallery."""
    limits, models = service.limits, service.models
    return (
        _templates()
        .get_template("page.html.j2")
        .render(
            name=name,
            num_images=len(service.watched.now().gallery),
            limits=limits,
            has_pretrained=models.pretrained.state != "absent",
        )
    )


@functools.cache
def stylesheet() -> str:
    """The style of the report without its curves' colours, and what this page adds to it. Matplotlib is not imported."""
    return _templates().get_template("page.css.j2").render(light=(), dark=())


@functools.cache
def _templates() -> jinja2.Environment:
    places = [jinja2.PackageLoader("personmae.serve", "."), jinja2.PackageLoader("personmae.report", ".")]
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader(places), autoescape=jinja2.select_autoescape(["html.j2"]), trim_blocks=True
    )


def _read(name: str) -> str:
    return resources.files("personmae.serve").joinpath(name).read_text(encoding="utf-8")


# --- the gallery ---


def _add_gallery(app: FastAPI, service: Service) -> None:
    @app.get("/api/state")
    def state() -> dict[str, Any]:
        return service.state()

    @app.get("/api/rows")
    def rows(
        page: Annotated[int, Query(ge=0, le=_MOST_PAGES)] = 0,
        camera: Annotated[str, Query(max_length=_LONGEST)] = "",
        part: Annotated[str, Query(max_length=_LONGEST)] = "",
    ) -> dict[str, Any]:
        return service.rows(page, camera, part)

    @app.get("/thumbnail/{key}")
    def thumbnail(key: Annotated[int, PathParameter(ge=0, le=asked.LARGEST_KEY)]) -> Response:
        return Response(service.thumbnail(key), media_type="image/jpeg")


# --- work on images ---


def _add_work(app: FastAPI, service: Service) -> None:
    one_at_a_time = asyncio.Semaphore(1)  # a network takes all cores, and an image that is decoded its memory

    async def work(request: Request, kind: type[Kind], do: Callable[[Kind, list[bytes]], dict[str, Any]]) -> dict[str, Any]:
        wanted, files = await asked.read(request, kind, service.limits)
        async with one_at_a_time:
            return await run_in_threadpool(do, wanted, files)

    @app.post("/api/search")
    async def search(request: Request) -> dict[str, Any]:
        return await work(request, asked.Search, service.search)

    @app.post("/api/compare")
    async def compare(request: Request) -> dict[str, Any]:
        return await work(request, asked.Comparison, service.compare)

    @app.post("/api/reconstruct")
    async def reconstruct(request: Request) -> dict[str, Any]:
        return await work(request, asked.Reconstruction, service.reconstruct)
