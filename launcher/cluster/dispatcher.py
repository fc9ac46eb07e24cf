"""``python -m launcher.cluster.dispatcher PLAN``: a suite's pod, which creates a benchmark's Job once its encoder is complete.

It keeps nothing: what is done follows from the Jobs and from the results in the bucket, so a new pod goes on where the last one
was. It may get and create Jobs in its namespace, and no more.
"""

import http.client
import json
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Protocol

from launcher.cluster import bucket, suite
from launcher.cluster.deployed import finished
from launcher.cluster.kustomization import Object
from personmae.errors import EXIT_STOPPED, UserError, run_program

PAUSE_SECONDS = 30.0
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Jobs(Protocol):
    """The Jobs of a namespace."""

    def get(self, name: str) -> Object | None: ...
    def create(self, job: Object) -> None: ...


class ApiJobs:
    """Jobs through the API server, as the pod's service account."""

    def __init__(self, server: str = "https://kubernetes.default.svc", account: Path = _ACCOUNT) -> None:
        self._account = account
        namespace = (account / "namespace").read_text(encoding="utf-8").strip()
        self._url = f"{server}/apis/batch/v1/namespaces/{namespace}/jobs"
        ca = account / "ca.crt"
        context = ssl.create_default_context(cafile=str(ca)) if ca.exists() else None
        # without a proxy, which a pod may have for its bucket: the API server is near
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

    def get(self, name: str) -> Object | None:
        return self._ask("GET", f"{self._url}/{name}", None, missing=404)

    def create(self, job: Object) -> None:
        self._ask("POST", self._url, job, missing=409)  # the last pod has created it

    def _ask(self, method: str, url: str, body: Object | None, *, missing: int) -> Object | None:
        token = (self._account / "token").read_text(encoding="utf-8").strip()  # it is renewed now and then
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers, method=method)
        try:
            with self._opener.open(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == missing:
                    return None
                answer = error.read(500).decode(errors="replace")
            if error.code == 403 and "exceeded quota" in answer:
                raise OSError(f"{method} {url}: {answer}") from None  # there will be room
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{method} {url} was refused ({error.code}): {answer}") from None
            raise


def main(argv: list[str] | None = None) -> int:
    """Dispatch the plan that the command line names; returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
    path = Path((sys.argv[1:] if argv is None else argv)[0])
    return run_program(lambda: run(json.loads(path.read_text(encoding="utf-8")), ApiJobs()))


def run(plan: dict[str, Any], jobs: Jobs, pause_seconds: float = PAUSE_SECONDS) -> None:
    """Create what can be created until all stages are over, then write the table.

    Raises:
        UserError: a stage has failed; the table says which, and has the others.
    """
    printed = ""
    while True:
        try:
            states = turn(plan["stages"], jobs)
        except (OSError, http.client.HTTPException) as error:  # API servers are updated, and a suite takes weeks
            print(
                f"dispatcher: the cluster did not answer, or has no room: {error!r}; again in {pause_seconds:g} s", flush=True
            )
            time.sleep(pause_seconds)
            continue
        if (line := ", ".join(f"{name} {state}" for name, state in states.items())) != printed:
            print(f"dispatcher: {line}", flush=True)
            printed = line
        if all(state == "Complete" or state.startswith("Failed") for state in states.values()):
            break
        time.sleep(pause_seconds)
    failed = {name: state for name, state in states.items() if state != "Complete"}
    found = {}
    for stage in plan["stages"]:
        if "result" in stage and stage["name"] not in failed:
            if content := bucket.read(stage["result"]):
                found[stage["name"]] = json.loads(content)
            else:
                failed[stage["name"]] = f"Failed: {stage['result']} is missing"
    for name, content in suite.result_files(found, failed).items():
        bucket.write(f"{plan['results'].rstrip('/')}/{name}", content)
    print(suite.table(found, failed), end="", flush=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(states)} stages failed: {', '.join(failed)}; see {plan['results']}/results.md")


def turn(stages: list[dict[str, Any]], jobs: Jobs) -> dict[str, str]:
    """Look at all stages once, in order, and create the Jobs whose time has come; returns each stage's state."""
    states: dict[str, str] = {}
    for stage in stages:
        job = jobs.get(stage["job"])
        before = states.get(stage["after"] or "", "Complete")
        if job is not None:
            states[stage["name"]] = finished(job) or "runs"
        elif stage["after"] is None:
            states[stage["name"]] = f"Failed: its Job {stage['job']} is gone"
        elif before.startswith("Failed"):
            states[stage["name"]] = f"Failed: {stage['after']} has failed"
        elif before == "Complete":
            jobs.create(stage["object"])
            states[stage["name"]] = "runs"
        else:
            states[stage["name"]] = f"waits for {stage['after']}"
    return states


if __name__ == "__main__":
    sys.exit(main())
