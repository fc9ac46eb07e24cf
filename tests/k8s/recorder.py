"""The recorded kubectl and what it says; see ``kubectl.py``."""

import json
from pathlib import Path
from typing import Any

import pytest
from sample_requests import DIGEST, PRETRAIN, ROOT

from launcher.cluster import cli, deployed

CONFIG = str(ROOT / "configs" / "pretrain_vit_base.yaml")
IMAGE = f"--image=registry.test/personmae@{DIGEST}"
ALL = "\n".join((*deployed._LEFT_BEHIND, "pods", "events"))
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
        self.answer("get configmap run-run", json.dumps({"data": {"NODES": "1:8", "RANKS": "8", "BATCH": "2048"}}))

    def answer(self, words: str, out: str = "", *, err: str = "", code: int = 0, created: bool = False) -> None:
        """What calls with these words are told, the newest first; with ``created``, only once objects were applied."""
        self._answers.insert(0, (words, code, out, err, created))
        (self._folder / "answers.json").write_text(json.dumps(self._answers))

    def answer_for_a_suite(self) -> None:
        """Its first stage is complete, its second at work, its third waits."""
        plan = json.dumps({"stages": [{"job": f"run-{name}-trainer"} for name in ("pre", "market", "duke")]})
        self.answer("get configmap run-config", json.dumps({"data": {"plan.json": plan}}))
        labelled = [
            job(metadata={"labels": {"app.kubernetes.io/instance": "run-pre"}}, status=ended("Complete")),
            job(metadata={"labels": {"app.kubernetes.io/instance": "run-market"}}),
        ]
        self.answer("get jobs.batch -l", json.dumps({"items": labelled}))

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


def job(**more: Any) -> dict[str, Any]:
    """A Job as the server tells it."""
    metadata = {
        "name": "run-trainer",
        "uid": "the-uid",
        "creationTimestamp": CREATED,
        "labels": {"app.kubernetes.io/instance": "run"},
        "annotations": {"personmae/store": "s3://bucket/run"},
    }
    return {"kind": "Job", "metadata": metadata, "spec": {"parallelism": 8}, "status": {"active": 8}} | more


def job_of(run: str, **more: Any) -> str:
    """A list with the Job of a run that writes to the same store."""
    labels = {"app.kubernetes.io/instance": run}
    return json.dumps({"items": [job(metadata=job()["metadata"] | {"labels": labels}, **more)]})


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


def event(reason: str, message: str, *, of: str = "run-trainer", at: str = CREATED) -> str:
    told = {"type": "Warning", "reason": reason, "message": message, "involvedObject": {"name": of}}
    return json.dumps({"items": [told | {"lastTimestamp": at, "metadata": {"creationTimestamp": at}}]})
