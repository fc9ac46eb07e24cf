"""A cluster through ``kubectl``: it brings every way of logging in, server-side apply, and logs that follow."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from launcher.cluster.kustomization import Object
from personmae.errors import UserError

_ANSWER_SECONDS = 10  # for one request; kubectl makes up to six before it gives a cluster up
_AWAY = ("unable to connect", "connection refused", "was refused", "timeout", "deadline exceeded", "no such host", "not answer")


class Kubectl:
    """``kubectl`` in one namespace of one context. What it warns of is printed on standard error, each line once."""

    def __init__(self, namespace: str, context: str | None = None) -> None:
        if not shutil.which("kubectl"):
            raise UserError("kubectl is required to talk to a cluster and is not on PATH; 'personmae render' works without it")
        self.namespace = namespace
        self.command = ["kubectl", *(["--context", context] if context else []), "--namespace", namespace]
        self._shown: set[str] = set()

    def run(self, *args: str, text: str | None = None, seconds: int | None = None) -> str:
        """Output of ``kubectl ARGS``.

        Raises:
            UserError: it failed, or a request had no answer in so many seconds; its own first line is in the message.
        """
        done = self._ask(*args, text=text, seconds=seconds)
        if done.returncode:
            raise UserError(_error_of(done.stderr, args, self.namespace))
        return done.stdout

    def _ask(self, *args: str, text: str | None = None, seconds: int | None = None) -> "subprocess.CompletedProcess[str]":
        """Call it, and pass its warnings on: a server says them of what it takes, with code 0."""
        done = self._call(*args, text=text, seconds=seconds)
        for line in done.stderr.splitlines():
            if line.startswith("Warning: ") and line not in self._shown:
                self._shown.add(line)
                print(f"warning: {line.removeprefix('Warning: ')}", file=sys.stderr, flush=True)
        return done

    def _call(self, *args: str, text: str | None = None, seconds: int | None = None) -> "subprocess.CompletedProcess[str]":
        command = [*self.command, f"--request-timeout={seconds or _ANSWER_SECONDS}s", *args]
        return subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, encoding="utf-8", errors="replace"
        )

    def kinds(self) -> set[str]:
        """What the cluster knows; where a part of its API is down, kubectl names the rest and fails all the same."""
        done = self._ask("api-resources", "--namespaced", "-o", "name")
        if not done.stdout.strip():
            raise UserError(_error_of(done.stderr, ("api-resources",), self.namespace))
        return set(done.stdout.split())

    def get(self, *args: str) -> Any:
        """``kubectl get ARGS`` as JSON; None where a named object does not exist."""
        out = self.run("get", *args, "--ignore-not-found", "-o", "json")
        return json.loads(out) if out.strip() else None

    def items(self, *args: str) -> list[Object]:
        return (self.get(*args) or {}).get("items", [])

    def items_of(self, resources: Sequence[str], *args: str) -> tuple[list[Object], list[str]]:
        """Objects of several kinds, and the resources that this user may not list.

        Raises:
            UserError: something else went wrong, so that objects may be missing.
        """
        done = self._ask("get", ",".join(resources), *args, "-o", "json")
        refused = [name for name in resources if re.search(rf"(?<![\w.]){re.escape(name)} is forbidden", done.stderr)]
        if done.returncode and len(refused) != len(re.findall("^error", done.stderr, re.MULTILINE | re.IGNORECASE)):
            raise UserError(_error_of(done.stderr, ("get",), self.namespace))
        return json.loads(done.stdout or "{}").get("items", []), refused

    def named(self, names: Sequence[str]) -> list[Object]:
        """Those of the objects ``resource/name`` that exist, with the managers of their fields."""
        found = self.get(*names, "--show-managed-fields") if names else None
        return [] if found is None else found["items"] if found["kind"] == "List" else [found]

    def may(self, verb: str, resource: str) -> bool:
        """Whether the user may do this in the namespace."""
        done = self._ask("auth", "can-i", verb, resource)
        if done.stdout.strip() not in ("yes", "no"):
            raise UserError(_error_of(done.stderr, ("auth",), self.namespace))
        return done.stdout.strip() == "yes"


def _error_of(stderr: str, args: Sequence[str], namespace: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not re.match(r"Warning:|[EWI]\d{4} ", line)]
    first = next((line for line in lines if line.startswith(("Error", "error"))), lines[0] if lines else "it said nothing")
    first = re.sub(r"^[Ee]rror( from server)?( \(\w+\))?: ", "", first)
    hint = "see 'kubectl config get-contexts', or give --context and --namespace"
    text = "\n".join(lines).lower()
    if "denied request" in text or "denied the request" in text:
        hint = "a policy of the cluster refuses it: change what it names, or ask the cluster's administrator"
    elif "forbidden" in text:
        hint = f"ask for the role personmae-submitter in namespace {namespace} (k8s/overlays/namespace)"
    elif "namespaces" in text and "not found" in text:
        hint = "create it: kubectl apply -k k8s/overlays/namespace; or give another --namespace"
    elif "no matches for kind" in text or "doesn't have a resource type" in text:
        hint = "its controller is not installed: choose another overlay or leave the component out"
    elif any(words in text for words in _AWAY) and "webhook" not in text:
        hint = "the cluster must be up and reachable from here; see 'kubectl config get-contexts', or give --context"
    return f"kubectl {args[0]} failed: {first}; {hint}"
