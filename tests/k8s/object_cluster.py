"""Stands in for a cluster of ``apiobjects.py``: its objects for ``kubectl``'s commands, and over HTTP for a pod. Nothing runs.

``personmae`` and a suite's dispatcher talk to both unchanged. Over HTTP the rights are those of the Roles and RoleBindings
that are there, and a server that restarts answers as a real one was seen to do.
"""

import http.server
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apiobjects import KINDS, Denied, Object, Objects, kind_of, qualified

from launcher.cluster.kubectl import Kubectl

Labels = dict[str, set[str]]  # the values that each may have


class ObjectCluster(Kubectl):
    """``kubectl`` on objects. The garbage collector takes its turn before every command while ``collects`` is true."""

    def __init__(self, namespace: str = "personmae") -> None:
        self.namespace, self.command, self._shown = namespace, ["kubectl"], set[str]()
        self.objects = Objects(namespace)
        self.collects = True
        self.calls: list[tuple[str, ...]] = []

    def kinds(self) -> set[str]:
        return {qualified(kind) for kind in KINDS} - {"secrets"}

    def may(self, verb: str, resource: str) -> bool:
        return True

    def _call(self, *args: str, text: str | None = None, seconds: int | None = None) -> "subprocess.CompletedProcess[str]":
        """What ``kubectl ARGS`` would do and say."""
        with self.objects.lock:
            self.calls.append(args)
            if self.collects:
                self.objects.collect()
            self.objects.warnings.clear()
            out, code, told = "", 0, ""
            try:
                out = self._answer(args, text or "")
            except Denied as error:
                code, told = 1, f"Error from server ({error.reason}): {error}\n"
            told = "".join(f"Warning: {line}\n" for line in self.objects.warnings) + told
            return subprocess.CompletedProcess([*args], code, out, told)

    def _answer(self, args: tuple[str, ...], text: str) -> str:
        match args:
            case ("apply", *rest):
                for item in json.loads(text)["items"]:
                    self.objects.apply(item, dry_run="--dry-run=server" in rest)
                return ""
            case ("get", "events" | "pods", *_):
                return json.dumps({"items": []})
            case ("get", "--raw", *_):
                raise Denied(404, "NotFound", "the server could not find the requested resource")
            case ("logs", *_):
                return ""
            case ("get", *rest):
                return self._get(rest)
            case ("patch", kind, name, "--type", "merge", "-p", patch):
                self.objects.patch(kind_of(kind), name, json.loads(patch))
                return ""
            case ("delete", *rest):
                return self._delete(rest)
        raise NotImplementedError(f"the stand-in knows no kubectl {' '.join(args)}")

    def _get(self, rest: list[str]) -> str:
        found = self._found(rest)
        if len(_names(rest)) != 1:
            return json.dumps({"kind": "List", "items": found})
        return json.dumps(found[0]) if found else ""

    def _found(self, rest: list[str]) -> list[Object]:
        """The objects that a command line names, or selects."""
        if names := _names(rest):
            return [self.objects.held[key] for key in names if key in self.objects.held]
        kinds = {kind_of(word) for word in rest[0].split(",")}
        labels = _selector(rest)
        return [item for (kind, _), item in self.objects.held.items() if kind in kinds and _is_selected(item, labels)]

    def _delete(self, rest: list[str]) -> str:
        policy = "Foreground" if "--cascade=foreground" in rest else "Background"
        named = [(item["kind"], item["metadata"]["name"]) for item in self._found(rest)]
        for kind, name in named:
            self.objects.delete(kind, name, policy)
        return "".join(f"{kind.lower()}/{name}\n" for kind, name in named)


def _names(rest: list[str]) -> list[tuple[str, str]]:
    """Kind and name of each object of ``KIND NAME`` or ``KIND/NAME ...``; none where there is a selector."""
    plain = [word for word in rest if not word.startswith("-") and word not in ("json", "name")]
    if "-l" in rest:
        return []
    if len(plain) == 2 and "/" not in plain[0]:
        return [(kind_of(plain[0]), plain[1])]
    return [(kind_of(word.split("/")[0]), word.split("/")[1]) for word in plain if "/" in word]


def _selector(rest: list[str]) -> Labels:
    text = rest[rest.index("-l") + 1] if "-l" in rest else ""
    found = {}
    for part in re.findall(r"[^,( ]+ in \([^)]*\)|[^,]+", text):
        key, values = part.split(" in ") if " in " in part else part.split("=")
        found[key] = set(values.strip("()").split(","))
    return found


def _is_selected(item: Object, labels: Labels) -> bool:
    own = item["metadata"].get("labels", {})
    return all(own.get(key) in values for key, values in labels.items())


class Server(http.server.ThreadingHTTPServer):
    """The objects of a cluster over HTTP, for the service account whose token is ``ACCOUNT``; see ``serve``.

    ``answers`` are given to the next requests instead of what they ask for: a code with the words of the error, or None for
    a connection that is closed. ``requests`` are those that have come.
    """

    daemon_threads = True

    def __init__(self, objects: Objects) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects = objects
        self.answers: list[tuple[int, str] | None] = []
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def require(self, account: str, verb: str, kind: str, name: str) -> None:
        """Raise ``Denied`` unless a Role that is bound to the account allows it, in the words of a real server."""
        user = f"system:serviceaccount:{self.objects.namespace}:{account}"
        group, lost = qualified(kind).partition(".")[2], ""
        for binding in self.objects.list(["RoleBinding"], {}):
            if account not in (subject["name"] for subject in binding["subjects"]):
                continue
            role = self.objects.held.get(("Role", binding["roleRef"]["name"]))
            lost = "" if role else f': RBAC: role.rbac.authorization.k8s.io "{binding["roleRef"]["name"]}" not found'
            if role and any(_allows(rule, verb, kind, name) for rule in role["rules"]):
                return
        told = f'{qualified(kind)} "{name}" is forbidden: User "{user}" cannot {verb} resource "{kind.lower()}s" in API group '
        told += f'"{group}" in the namespace "{self.objects.namespace}"{lost}'
        raise Denied(403, "Forbidden", told, kind, name)


def _allows(rule: Object, verb: str, kind: str, name: str) -> bool:
    plural, _, group = qualified(kind).partition(".")
    named = name in rule["resourceNames"] if "resourceNames" in rule else True
    return verb in rule["verbs"] and plural in rule["resources"] and group in rule["apiGroups"] and named


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path))
        try:
            if self.server.answers:
                if (told := self.server.answers.pop(0)) is None:
                    self.close_connection = True
                    return
                raise Denied(told[0], "", told[1])
            with self.server.objects.lock:
                self.server.objects.collect()
                self._tell(200, self._do(json.loads(body or b"null")))
        except Denied as error:
            self._tell(error.code, error.status())

    def _do(self, body: Any) -> Object:
        path = self.path.partition("?")[0]
        match = re.fullmatch(rf"/(?:api|apis/[^/]+)/v\w+/namespaces/{self.server.objects.namespace}/(\w+)(?:/([\w.-]+))?", path)
        if not match:
            raise Denied(404, "NotFound", "the server could not find the requested resource")
        kind, name = kind_of(match[1]), match[2] or (body or {}).get("metadata", {}).get("name", "")
        verb = {"GET": "get", "POST": "create", "PATCH": "patch"}[self.command]
        account = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        self.server.require(account, verb, kind, "" if verb == "create" else name)
        match verb:
            case "get":
                return self.server.objects.get(kind, name)
            case "create":
                return self.server.objects.create(body)
        assert self.headers["Content-Type"] == "application/merge-patch+json"
        return self.server.objects.patch(kind, name, body)

    def _tell(self, code: int, answer: Object) -> None:
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(objects: Objects) -> Iterator[Server]:
    """A server of objects while the block runs."""
    server = Server(objects)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def account(folder: Path, name: str, namespace: str = "personmae") -> Path:
    """The folder that a pod of a service account finds in its file system."""
    folder.mkdir(exist_ok=True)
    (folder / "namespace").write_text(f"{namespace}\n")
    (folder / "token").write_text(name)
    return folder
