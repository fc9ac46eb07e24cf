"""Who may ask, by which name, how often and how much. And what every answer says to the browser."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest
import requests
from served import Made, Page, ask, service_of, serving

from personmae.serve import gate, server
from personmae.serve.limits import Limits, Places, Rates, Refusal

SOME = {"images": [{"key": 0}]}
PASSWORD = "correct horse"
OTHER = b'--a\r\nContent-Disposition: form-data; name="other"\r\n\r\n1\r\n--a--\r\n'


@pytest.fixture(scope="module")
def locked(made: Made) -> Iterator[Page]:
    limits = Limits(burst=10_000, passwords=4, password_seconds=1000)
    with serving(service_of(made, limits, with_models=False), password=PASSWORD, hosts=None) as page:
        yield page


# --- headers ---


def test_every_answer_has_the_headers_that_protect_it(page: Page):
    paths = ["/", "/static/page.css", "/static/page.js", "/api/state", "/thumbnail/0", "/thumbnail/99999", "/nothing"]
    answers = [page.get(path) for path in paths] + [page.ask("/api/search", SOME), page.ask("/api/search", SOME, headers={})]
    for answer in answers:
        assert {name: answer.headers[name] for name in gate.HEADERS} == gate.HEADERS
        assert "server" not in answer.headers
        assert "set-cookie" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers
    assert "no-store" in gate.HEADERS["cache-control"]
    assert "unsafe" not in gate.HEADERS["content-security-policy"]


def test_the_page_names_nothing_outside_itself(page: Page):
    for path in ("/", "/static/page.css", *(f"/static/{name}.js" for name in ("page", "parts", "search", "compare"))):
        text = page.get(path).text.replace("http://www.w3.org/2000/svg", "")  # a name and no address
        assert len(text) > 500
        for word in ("http:", "https:", "//cdn", "@import", "innerHTML", "eval(", " style=", " onclick"):
            assert word not in text, (path, word)


@pytest.mark.parametrize(
    "path",
    [
        *("/docs", "/redoc", "/openapi.json", "/static/", "/static/server.py", "/static/../server.py", "/static/%2e%2e/app.py"),
        *("/gallery.json", "/../../etc/passwd", "//etc/passwd", "/static/page.html.j2", "/thumbnail/", "/api/"),
    ],
)
def test_no_file_and_no_other_page_is_there(page: Page, path: str):
    url = requests.Request("GET", page.url).prepare()
    url.url = page.url + path  # as it is: requests would take the dots out
    with requests.Session() as session:
        answer = session.send(url, timeout=30)
    assert answer.status_code == 404
    assert list(answer.json()) == ["error"]


def test_head_is_answered_as_get_without_a_body(page: Page):
    for path, status in (("/", 200), ("/thumbnail/0", 200), ("/nothing", 404)):
        answer, whole = requests.head(page.url + path, timeout=30), page.get(path)
        assert (answer.status_code, answer.content) == (status, b"")
        assert answer.headers["content-length"] == str(len(whole.content))


# --- names and origins ---


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "10.1.2.3:80", "[::1]:8765"])
def test_an_address_or_a_known_name_is_a_host(page: Page, host: str):
    assert page.get("/api/state", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1", "a b"])
def test_a_foreign_name_is_refused(page: Page, host: str):
    for answer in (page.get("/", headers={"Host": host}), page.get("/thumbnail/0", headers={"Host": host})):
        assert answer.status_code == 400
        assert "does not go by that name" in answer.json()["error"]


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "", None, "http://127.0.0.1", "http://[::1", "{url}.evil.example"]
)
def test_a_form_of_another_site_is_refused(page: Page, origin: str | None):
    headers = {} if origin is None else {"Origin": origin.format(url=page.url)}
    for path in ("/api/search", "/api/compare", "/api/reconstruct"):
        answer = page.ask(path, SOME, headers=headers)
        assert answer.status_code == 403
        assert "only this page itself" in answer.json()["error"]


# --- the password ---


def test_a_password_is_required_for_everything(locked: Page):
    for path in ("/", "/static/page.js", "/api/state", "/api/rows", "/thumbnail/0"):
        answer = locked.get(path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic")
        assert locked.get(path, auth=("anybody", PASSWORD)).status_code == 200
    assert ask(locked.url, "/api/search", SOME).status_code == 401
    assert ask(locked.url, "/api/search", SOME, auth=("", PASSWORD)).status_code == 200
    assert locked.get("/", headers={"Authorization": "Basic !!!"}).status_code == 401
    assert locked.get("/", headers={"Authorization": "Bearer x"}).status_code == 401


def test_guessing_ends_soon_and_the_password_does_not_help_then(made: Made):
    limits = Limits(passwords=4, password_seconds=1000)
    with serving(service_of(made, limits, with_models=False), password=PASSWORD, hosts=None) as page:
        codes = [page.get("/api/state", auth=("", f"wrong {n}")).status_code for n in range(6)]
        assert codes == [401, 401, 401, 401, 429, 429]
        late = page.get("/api/state", auth=("", PASSWORD))
        assert late.status_code == 429
        assert int(late.headers["retry-after"]) > 900


def test_who_does_not_know_the_password_holds_no_place(made: Made):
    with serving(service_of(made, Limits(inside=1, inside_each=1), with_models=False), password=PASSWORD, hosts=None) as page:
        head = f"POST /api/search HTTP/1.1\r\nHost: a\r\nOrigin: {page.url}\r\nContent-Length: 9000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(page.url.rpartition(":")[2])), timeout=20) as sock:
            sock.sendall(head.encode())
            assert page.get("/api/state", auth=("", PASSWORD)).status_code == 200  # so the first was looked at
            assert page.ask("/api/search", SOME, auth=("", PASSWORD)).status_code == 200
            sock.sendall(bytes(9000))
            assert sock.recv(12) == b"HTTP/1.1 401"


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("a.socket", "a.socket"),
    ],
)
def test_a_network_of_ipv6_is_one_client(host: str, client: str):
    assert gate.client_of({"client": (host, 1)}) == client


# --- how much ---


def test_a_client_that_asks_too_often_has_to_wait(made: Made):
    with serving(service_of(made, Limits(burst=3, per_second=0.01), with_models=False)) as page:
        answers = [page.ask("/api/search", SOME) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert 50 < int(answers[-1].headers["retry-after"]) <= 101
        assert page.get("/api/state").status_code == 200


def test_rates_fill_up_again_and_forget_the_oldest_clients(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    rates = Rates(2, 0.5, clock=lambda: now[0])
    assert [rates.take("a"), rates.take("a")] == [0, 0]
    assert rates.take("a") == pytest.approx(2)
    assert rates.wait("b") == 0
    now[0] += 1
    assert rates.wait("a") == rates.take("a") == pytest.approx(1)
    now[0] += 1
    assert rates.take("a") == 0
    now[0] += 1000
    assert [rates.take("a") for _ in range(3)] == [0, 0, pytest.approx(2)]
    monkeypatch.setattr("personmae.serve.limits.MOST_CLIENTS", 3)
    for name in "bcde":
        rates.take(name)
    assert rates.take("a") == 0  # forgotten, so its bucket is full
    assert len(rates._buckets) == 3


def test_places_are_given_back():
    places = Places(3, 2)
    with places.one("a"), places.one("a"):
        with pytest.raises(Refusal) as caught, places.one("a"):
            pass
        assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "2"})
        with places.one("b"), pytest.raises(Refusal), places.one("c"):
            pass
        assert places.taken == 2
    with pytest.raises(KeyError), places.one("a"):
        raise KeyError
    assert (places.taken, len(places._taken)) == (0, 0)


def test_a_body_is_bounded_by_what_it_announces_and_by_what_comes(made: Made):
    with serving(service_of(made, Limits(burst=100, body=200_000), with_models=False)) as page:
        headers = {"Origin": page.url, "Content-Type": "multipart/form-data; boundary=x"}
        head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for body in (bytes(200_001), (head if not n else bytes(10_000) for n in range(40))):  # the second has no length
            answer = requests.post(f"{page.url}/api/search", data=body, headers=headers, timeout=30)
            assert answer.status_code == 413
            assert "at most 0.2 MB" in answer.json()["error"]
        assert page.ask("/api/search", SOME).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{}", "application/json", 415),
        (b"", "multipart/form-data", 400),
        (b"xyz", "multipart/form-data; boundary=a", 400),
        (b"--a\r\n\r\n--a--\r\n", "multipart/form-data; boundary=a", 400),
        (OTHER, "multipart/form-data; boundary=a", 400),
        (OTHER, "multipart/form-data; boundary=a; charset=undefined", 400),  # Python has an encoding of that name
        (OTHER, "Multipart/Form-Data; boundary=a", 400),
    ],
)
def test_what_is_no_form_is_refused(page: Page, content: bytes, kind: str, status: int):
    headers = {"Origin": page.url, "Content-Type": kind}
    answer = requests.post(f"{page.url}/api/search", data=content, headers=headers, timeout=30)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]


def test_too_many_images_in_a_form_are_refused(made: Made, page: Page):
    answer = page.ask("/api/search", SOME, [made.image()] * 9)
    assert answer.status_code == 400
    assert "At most 8 images are taken" in answer.json()["error"]


def test_a_body_that_does_not_arrive_is_not_waited_for():
    async def silent():
        await asyncio.sleep(60)

    async def wait() -> None:
        body = gate.Body(silent, Limits(body_seconds=0.05))  # pyright: ignore[reportArgumentType] - it never answers
        with pytest.raises(Refusal) as caught:
            await body.receive()
        assert caught.value.status == 408

    asyncio.run(wait())


def test_a_connection_without_a_request_is_closed(made: Made):
    with serving(service_of(made, Limits(header_seconds=0.2), with_models=False)) as page:
        address = ("127.0.0.1", int(page.url.rpartition(":")[2]))
        for sent in (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "):
            with socket.create_connection(address, timeout=20) as sock:
                sock.sendall(sent)
                began = time.monotonic()
                assert sock.recv(100) == b""
                assert time.monotonic() - began < 15
        assert page.get("/api/state").status_code == 200


def test_an_unfinished_form_gets_an_answer_when_the_server_ends(made: Made, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setitem(server._OPTIONS, "timeout_graceful_shutdown", 0.1)
    kind = "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 9000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        with serving(service_of(made, with_models=False)) as page:
            socks = []
            for begun in ("--x", "no form"):  # the second is refused, and the rest of it is waited for
                sock = socket.create_connection(("127.0.0.1", int(page.url.rpartition(":")[2])), timeout=20)
                socks.append(stack.enter_context(sock))
                head = f"POST /api/search HTTP/1.1\r\nHost: {page.url[7:]}\r\nOrigin: {page.url}\r\n"
                sock.sendall(f"{head}{kind}{begun}".encode())
            assert page.get("/api/state").status_code == 200  # so both have begun
        for sock in socks:
            assert sock.recv(12) == b"HTTP/1.1 503"
    assert [record for record in caplog.records if record.exc_info] == []


def test_a_client_that_goes_away_leaves_the_server_well(made: Made, page: Page):
    address = ("127.0.0.1", int(page.url.rpartition(":")[2]))
    head = "POST /api/search HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nContent-Length: 9000\r\n"
    with socket.create_connection(address, timeout=20) as sock:
        sock.sendall(f"{head}Content-Type: multipart/form-data; boundary=a\r\n\r\n--a".encode())
    assert json.loads(page.get("/api/state").text)["num_images"] > 0
    assert page.ask("/api/search", SOME).status_code == 200
