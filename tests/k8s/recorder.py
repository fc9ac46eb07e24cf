"""The recorded kubectl and what it says; see ``kubectl.py``."""

import json
from pathlib import Path
from typing import Any

import pytest
from sample_requests import DIGEST, PRETRAIN, ROOT

from launcher.cluster import cli, objects

CONFIG = str(ROOT / "configs" / "pretrain_vit_base.yaml")
IMAGE = f"--image=registry.test/personmae@{DIGEST}"
ALL = "\n".join((*objects.KINDS, "pods", "events"))
CREATED = "2026-01-02T03:04:05Z"
Captured = pytest.CaptureFixture[str]


class Recorder:
    """The recorded kubectl: the newest answer that fits a call is given."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._answers = folder, []
        (folder / "calls.jsonl").touch()
        self.answer("auth can-i", "yes\n")
        self.answer("api-resources", ALL)
        self.answer("get jobs.batch run-trainer", json.dumps(job()), created=True)
        self.answer("get -l --show-managed-fields app.kubernetes.io/instance=run", items(*OF_RUN))
        self.answer("get configmap run-run", json.dumps({"data": {"NODES": "1:8", "RANKS": "8", "BATCH": "2048"}}))

    def answer(self, words: str, out: str = "", *, err: str = "", code: int = 0, created: bool = False) -> None:
        """What calls with these words are told, the newest first; with ``created``, only once objects were applied.

        A call for objects by ``kind/name`` has the word 'named' instead of 'get'.
        """
        self._answers.insert(0, (words, code, out, err, created))
        (self._folder / "answers.new").write_text(json.dumps(self._answers))
        (self._folder / "answers.new").replace(self._folder / "answers.json")  # at once: a kubectl may be reading

    def answer_for_a_suite(self) -> None:
        """Its first stage is complete, its second at work, its third waits."""
        plan = json.dumps({"stages": [{"job": f"run-{name}-trainer"} for name in ("pre", "market", "duke")]})
        self.answer("get configmap run-config", json.dumps({"data": {"plan.json": plan}}))
        labelled = [job("run-pre", status=ended("Complete")), job("run-market")]
        self.answer("get jobs.batch -l", items(*labelled))

    def forget(self) -> None:
        (self._folder / "calls.jsonl").write_text("")

    def calls(self) -> list[list[str]]:
        """Arguments of all calls, without the namespace and the time-out."""
        return [[arg for arg in call["args"][2:] if not arg.startswith("--request-timeout=")] for call in self._calls()]

    def applied(self) -> list[str]:
        """'dry-run' or 'apply' for each, with the number of objects."""
        found = [c for c in self._calls() if "apply" in c["args"]]
        return [
            f"{'dry-run' if '--dry-run=server' in c['args'] else 'apply'} {len(json.loads(c['text'])['items'])}" for c in found
        ]

    def _calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self._folder / "calls.jsonl").read_text().splitlines()]


def labels(run: str) -> dict[str, str]:
    """What every object of a run bears, and its workload too."""
    return {"app.kubernetes.io/instance": run, "personmae/run": run, "app.kubernetes.io/name": "personmae"}


def job(run: str = "run", **more: Any) -> dict[str, Any]:
    """A Job as the server tells it."""
    metadata = {
        "name": f"{run}-trainer",
        "uid": "the-uid",
        "creationTimestamp": CREATED,
        "labels": labels(run),
        "annotations": {"personmae/store": "s3://bucket/run"},
    }
    spec, status = {"parallelism": 8}, {"active": 8}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec, "status": status} | more


def marked(item: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    """An object with something else in its metadata."""
    return item | {"metadata": item["metadata"] | metadata}


def thing(kind: str, name: str, run: str = "run", group: str = "v1", **metadata: Any) -> dict[str, Any]:
    """Another object as the server tells it."""
    own = {"name": name, "uid": f"uid-of-{name}", "labels": labels(run)}
    return {"apiVersion": group, "kind": kind, "metadata": own | metadata}


def pod(index: int, name: str = "abcde", *, component: str = "trainer", **status: Any) -> dict[str, Any]:
    """A pod of a run as the server tells it, on node-a unless it is Pending."""
    metadata = {
        "name": f"run-{component}-{index}-{name}",
        "annotations": {"batch.kubernetes.io/job-completion-index": str(index)} if component == "trainer" else {},
        "labels": labels("run") | {"app.kubernetes.io/component": component},
        "creationTimestamp": CREATED,
    }
    spec = {} if status.get("phase") == "Pending" else {"nodeName": "node-a"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}


def container(name: str, **state: Any) -> dict[str, Any]:
    """The status of a container, e.g. ``running={}``."""
    return {"name": name, "image": "personmae", "state": state, "restartCount": 0}


RUNNING: dict[str, Any] = {"phase": "Running", "containerStatuses": [container("trainer", running={})]}


def stopped(code: int, at: str = CREATED) -> dict[str, Any]:
    """The status of a pod whose trainer has ended with a code."""
    ended = {"exitCode": code, "finishedAt": at, "reason": "Error"}
    return {"phase": "Failed", "containerStatuses": [container("trainer", terminated=ended)]}


def items(*objects: dict[str, Any]) -> str:
    return json.dumps({"kind": "List", "items": objects})


def job_of(run: str, **more: Any) -> str:
    """A list with the Job of a run that writes to the same store."""
    return items(job(run, **more))


def ended(kind: str, **more: str) -> dict[str, Any]:
    return {"conditions": [{"type": kind, "status": "True", **more}]}


def personmae(*args: str) -> int:
    return cli.main(list(args))


def submitted(*more: str) -> int:
    return personmae("submit", CONFIG, *PRETRAIN, IMAGE, "--name", "run", "--no-bucket-check", *more)


def error(capsys: Captured) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def event(reason: str, message: str, *, of: str = "run-trainer", at: str = CREATED, kind: str = "Job") -> str:
    told = {"type": "Warning", "reason": reason, "message": message, "involvedObject": {"kind": kind, "name": of}}
    return json.dumps({"items": [told | {"lastTimestamp": at, "metadata": {"creationTimestamp": at}}]})


OF_RUN = (
    job(),
    thing("Deployment", "run-store", group="apps/v1"),
    thing("Service", "run-store"),
    thing("ConfigMap", "run-run"),
)
