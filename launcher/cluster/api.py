"""The API server as a pod's service account sees it: objects are read, created and patched.

The standard library is enough, so a dispatcher needs no kubectl. What the server answers is told apart here: what is there,
what is not, what is refused, and what passes by itself.
"""

import http.client
import json
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Protocol

from launcher.cluster.kustomization import Object

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_ANSWER_SECONDS = 30
_PASSING_CODES = (408, 409, 429)
_PASSING_WORDS = ("exceeded quota", "status unknown for quota", "being terminated", "is being deleted")
_MOST_WORDS = 500


class Away(OSError):  # noqa: N818 - no answer
    """The server gave no answer, or none that can be read."""


class Refused(OSError):  # noqa: N818 - an answer
    """The server answered and did not do what it was asked.

    ``final`` says that the same request may be refused for good: by a right that is missing, an admission policy, or a field.
    It may also pass, for a server that restarts does not know the roles yet. ``missing`` says that the object does not exist.
    """

    def __init__(self, what: str, code: int, text: str):
        status = _status_of(text)
        super().__init__(f"{what} was refused ({code}): {' '.join(status.get('message', text).split())[:_MOST_WORDS]}")
        self.code, self.reason, self.details = code, status.get("reason", ""), status.get("details") or {}
        passing = code >= 500 or code in _PASSING_CODES or any(words in str(self) for words in _PASSING_WORDS)
        self.final = not passing

    def is_missing(self, item: Object) -> bool:
        """Whether it says that this object does not exist; a server that starts has 404 for whole groups too."""
        return self.reason == "NotFound" and self.details.get("name") == item["metadata"]["name"]


class Cluster(Protocol):
    """What a dispatcher needs of a cluster. An object is named by one with apiVersion, kind and metadata.name."""

    def get(self, item: Object) -> Object | None: ...
    def create(self, item: Object) -> Object | None: ...
    def patch(self, item: Object, change: Object) -> Object: ...


class Api:
    """The namespace of the pod. Every method raises ``Away`` or ``Refused``."""

    def __init__(self, server: str = "https://kubernetes.default.svc", account: Path = _ACCOUNT) -> None:
        self._server, self._account = server, account
        self._namespace = (account / "namespace").read_text(encoding="utf-8").strip()
        ca = account / "ca.crt"
        context = ssl.create_default_context(cafile=str(ca)) if ca.exists() else None
        # without a proxy, which a pod may have for its bucket: the API server is near
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

    def get(self, item: Object) -> Object | None:
        """The live object; None where it does not exist."""
        try:
            return self._ask("GET", self._path(item, named=True))
        except Refused as error:
            if error.is_missing(item):
                return None
            raise

    def create(self, item: Object) -> Object | None:
        """The object as it was created; None where there is one of that name, which may be on its way out."""
        try:
            return self._ask("POST", f"{self._path(item, named=False)}?fieldManager=personmae", item)
        except Refused as error:
            if error.reason == "AlreadyExists":
                return None
            raise

    def patch(self, item: Object, change: Object) -> Object:
        """The object after a JSON merge patch."""
        return self._ask("PATCH", f"{self._path(item, named=True)}?fieldManager=personmae", change)

    def _path(self, item: Object, *, named: bool) -> str:
        version, kind = item["apiVersion"], item["kind"].lower()
        plural = f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        return f"{root}/namespaces/{self._namespace}/{plural}" + (f"/{item['metadata']['name']}" if named else "")

    def _ask(self, method: str, path: str, body: Object | None = None) -> Object:
        token = (self._account / "token").read_text(encoding="utf-8").strip()  # it is renewed now and then
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Authorization": f"Bearer {token}", "Content-Type": kind, "Accept": "application/json"}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"{self._server}{path}", data, headers, method=method)
        what = f"{method} {path.partition('?')[0]}"
        try:
            with self._opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(what, error.code, error.read(100_000).decode(errors="replace")) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Away(f"{what} had no answer: {error!r}") from None


def _status_of(text: str) -> dict[str, Any]:
    """The ``Status`` object of an answer; a proxy's answer is none."""
    try:
        status = json.loads(text)
    except ValueError:
        return {}
    return status if isinstance(status, dict) else {}
