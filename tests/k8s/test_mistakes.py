"""Mistakes at the real command line: one line with code 78, before anything is created, or with all of it deleted again."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from recorder import CONFIG, IMAGE, Captured, Recorder, error, event, job, personmae
from sample_requests import PRETRAIN

from launcher.cluster import kubectl
from personmae.errors import EXIT_USER_ERROR

RUN = [CONFIG, *PRETRAIN, IMAGE, "--name", "run"]
SUBMIT = ["submit", *RUN, "--no-bucket-check"]
VERBS = ("render", "submit", "status", "logs", "scale", "suspend", "resume", "adopt", "delete")


def program(*args: str, environ: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    return warm.run(["-m", "personmae", *args], env=os.environ | (environ or {}) | warm.FIXED)


def told(*args: str, environ: dict[str, str] | None = None) -> str:
    """The line that ``personmae`` ends with, which must be its only one but for warnings, with code 78 and nothing printed."""
    done = program(*args, environ=environ)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert done.stdout == ""
    return lines[0]


def created(recorder: Recorder) -> list[str]:
    """Calls that may have changed the cluster."""
    return [
        " ".join(call)
        for call in recorder.calls()
        if call[0] in ("create", "apply", "patch", "delete", "replace") and "--dry-run=server" not in call
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--overlay", "nothing"], "--overlay must be one of dev-cpu, finetune-market1501"),
        (["--overlay", "namespace"], "--overlay must be one of"),
        (["init=s3://b/mae"], "init of a pre-training must be 'random' in pods, which fetch no weights for it. Got s3://b/mae"),
        (["--nodes", "1:3", "--gpus", "8"], "the number of ranks must divide train.global_batch_size=2048; --nodes 3 times"),
        (["--gpus", "3"], "--nodes 8 times --gpus 3 is 24"),
        (["--gpus", "-1"], "--gpus must be 0, for one rank on the CPU, or the GPUs of each node; got -1"),
        (["--gpus", "1.5"], "argument --gpus: invalid int value"),
        (["--nodes", "0"], "must be N or MIN:MAX with 1 <= MIN <= MAX, got 0"),
        (["--nodes", "8:2"], "must be N or MIN:MAX with 1 <= MIN <= MAX, got 8:2"),
        (["--nodes", "many"], "must be N or MIN:MAX"),
        (["--cpu", "lots"], "--cpu must be a quantity of Kubernetes above 0, e.g. 8 or 500m; got 'lots'"),
        (["--memory", "64GB"], "--memory must be a quantity of Kubernetes above 0, e.g. 64Gi; got '64GB'"),
        (["--memory", "0Gi"], "--memory must be a quantity"),
        (["--name", "x" * 39], "at most 38 characters of a-z, 0-9 and '-', beginning with a letter"),
        (["--name", "Run"], "at most 38 characters"),
        (["--name", "my_run"], "at most 38 characters"),
        (["--name", "1st"], "at most 38 characters"),
        (["--name", ""], "at most 38 characters"),
        (["-n", "My_Team"], "--namespace must be at most 63 characters"),
        (["--image", "personmae@sha256:1"], "--image must be NAME[:TAG]@sha256:64 hexadecimal digits"),
        (["--image", ""], "an image is required"),
        (["--with", "spott"], "--with takes efa, gke-workload-identity"),
        (["--with", "spot", "--with", "spot-gke"], "--with takes one of spot and spot-gke, not both"),
        (["--overlay", "dev-cpu", "--with", "efa"], "the component efa does not go with the overlay dev-cpu"),
        (["--with", "irsa", "--role", "me"], "--role for irsa must look like arn:aws:iam::ACCOUNT:role/NAME; got 'me'"),
        (["--env", "NODES=9:9"], "--env NODES is set by the run itself"),
        (["--env", "my_password=x"], "would be readable by all in a config map"),
        (["--set", "checkpoint.upload_to=s3://"], "checkpoint.upload_to must be on s3://"),
        (["--set", "train.global_batch_siz=1"], "unknown key 'train.global_batch_siz'"),
        (["--wait", "-1"], "argument --wait: must be seconds, 0 or more; got '-1'"),
        (["--dry-run", "maybe"], "argument --dry-run: invalid choice: 'maybe'"),
        (["--frobnicate"], "unknown option '--frobnicate'"),
        (["--local"], "--local is for a suite"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_wrong_request_is_one_line_and_asks_nothing_of_the_cluster(
    arguments: list[str], line: str, recorder: Recorder
) -> None:
    assert line in told(*SUBMIT, *arguments)
    assert recorder.calls() == []


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "a configuration file is required"),
        (b"", "must hold 'key: value' lines"),
        (b"a: [", "must be YAML"),
        (b"\xff\xfe", "must be a text file in UTF-8"),
        (b"_base_: ../here/config.yaml\n", "_base_ must not lead back to the same file"),
        (b"run_dir: x\n", "names no program by a key 'data' or 'benchmark'"),
        (b"name: s\nresults: s3://b/s\nstages:\n- {name: a, config: gone.yaml}\n", "a configuration file is required"),
        (b"name: s\nresults: s3://b/s\nstages:\n- {name: a, config: x.yaml, after: pre}\n", "stage a is after pre"),
        (b"name: s\nresults: s3://b/s\nstages:\n- {name: a, confg: x.yaml}\n", "'stages.0.config' is required"),
        (b"name: s\nresults: s3://b/s\nstages:\n- {name: a, name: b, config: x.yaml}\n", "'name' is given twice, in line 4"),
        (b"name: s\nresults: s3://b/s\nstages:\n- {name: a, config: x, set: ['root={m.x}']}\n", "stage a sets root={m.x}"),
        (b"name: s\nresults: s3://b/s\nstages: []\n", "stages"),
    ],
    ids=str,
)
def test_a_file_that_is_missing_or_wrong_is_one_line(
    content: bytes | None, line: str, recorder: Recorder, tmp_path: Path
) -> None:
    path = tmp_path / "here" / "config.yaml"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    assert line in told("submit", str(path), IMAGE, "--no-bucket-check")
    assert recorder.calls() == []


def test_an_image_without_a_digest_is_warned_of_in_one_line(recorder: Recorder) -> None:
    done = program(*SUBMIT, "--image", "registry.test/personmae:1", "--nodes", "8", "--dry-run", "client")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "warning: the image has no digest, so it may change between pods: give --image NAME@sha256:..."
    ]
    assert recorder.calls() == []


@pytest.mark.parametrize(
    ("arguments", "words", "answer", "line"),
    [
        (["--with", "s3-secret"], "get secret", {}, "the secret personmae-s3 is required in namespace personmae; create it"),
        ([], "auth can-i", {"out": "no\n", "code": 1}, "you may not create jobs in namespace personmae; ask for the role"),
        (
            [],
            "apply --dry-run=server",
            {"err": 'Error from server (NotFound): namespaces "personmae" not found\n', "code": 1},
            'namespaces "personmae" not found; create it: kubectl apply -k k8s/overlays/namespace',
        ),
    ],
    ids=["secret missing", "namespace without permission", "no namespace"],
)
def test_what_the_cluster_lacks_is_one_line_before_anything_is_created(
    arguments: list[str], words: str, answer: dict[str, Any], line: str, recorder: Recorder
) -> None:
    recorder.answer(words, **answer)
    assert line in told(*SUBMIT, *arguments)
    assert recorder.calls()
    assert created(recorder) == []


@pytest.mark.parametrize(
    ("words", "answer", "line"),
    [
        ("apply --server-side", {"code": 1, "err": "Error from server (Forbidden): exceeded quota: x\n"}, "exceeded quota"),
        ("get events", {"out": event("FailedCreate", "pods is forbidden: violates PodSecurity")}, "violates PodSecurity"),
    ],
    ids=["half-way", "pods refused"],
)
def test_what_is_refused_once_it_is_created_is_one_line_and_deleted_again(
    words: str, answer: dict[str, Any], line: str, recorder: Recorder
) -> None:
    recorder.answer(words, **answer)
    recorder.answer("apply --dry-run=server")
    assert line in told(*SUBMIT)
    assert created(recorder)[-1].startswith("delete job.batch/run-trainer deployment.apps/run-store ")


@pytest.mark.parametrize("verb", VERBS[2:])
@pytest.mark.parametrize("name", ["other", "-x", "Run", "a,b", "a b", ""])
def test_a_run_that_does_not_exist_or_cannot_is_one_line_and_nothing_is_changed(
    verb: str, name: str, recorder: Recorder
) -> None:
    recorder.answer("get jobs.batch -l", json.dumps({"items": [job()]}))
    recorder.answer("delete", "")
    more = ["--nodes", "2"] if verb == "scale" else []
    line = told(verb, *more, "--", name)
    if name == "other":
        assert "there is no run other in namespace personmae; there is run" in line
        assert created(recorder) == []
    else:
        assert "a run's name must be at most 38 characters" in line
        assert recorder.calls() == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["renderr"], "unknown verb 'renderr'. Did you mean 'render'?"),
        (["render"], "the following arguments are required: CONFIG"),
        (["render", CONFIG, "-o", "xml"], "argument -o/--output: invalid choice: 'xml'"),
        (["status"], "the following arguments are required: RUN"),
        (["status", "run", "-o", "xml"], "invalid choice: 'xml'"),
        (["scale", "run"], "the following arguments are required: --nodes"),
        (["scale", "run", "--nodes", "two"], "argument --nodes: invalid int value: 'two'"),
        (["logs", "run", "--index", "-1"], "must be a pod's index, 0 or more; got '-1'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], line: str, recorder: Recorder) -> None:
    assert line in told(*arguments)
    assert recorder.calls() == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    done = program(verb, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: personmae {verb} ")
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["kustomization.yaml", "kustomization.yml", "Kustomization", ""])
def test_a_folder_with_another_kustomization_is_left_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / (name or "file")).write_text("mine")
    line = told("render", *RUN, "--write", str(tmp_path if name else tmp_path / "file"))
    assert ("--write needs a folder without" if name else "something else is in the way") in line
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


# --- the real kubectl -----------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield server.getsockname()[1]


def kubeconfig(path: Path, port: int) -> Path:
    path.write_text(
        json.dumps(
            {
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "users": [{"name": "u", "user": {"token": "x"}}],
                "current-context": "c",
            }
        )
    )
    return path


TALKING = [SUBMIT, ["status", "run"], ["delete", "run"]]


@pytest.mark.parametrize("arguments", TALKING, ids=lambda value: value[0])
def test_without_kubectl_or_a_context_a_verb_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    assert "kubectl is required to talk to a cluster" in told(*arguments, environ={"PATH": str(tmp_path)})
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl on PATH")
    none = {"KUBECONFIG": str(tmp_path / "none")}
    line = told(*arguments, environ=none)
    assert "the cluster must be up and reachable from here" in line
    assert "memcache.go" not in line  # kubectl's own log comes before its error
    assert 'context "there" does not exist' in told(*arguments, "--context", "there", environ=none)


@pytest.mark.parametrize("arguments", TALKING, ids=lambda value: value[0])
def test_a_cluster_that_does_not_answer_is_given_up(
    arguments: list[str], silent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl on PATH")
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "config", silent)))
    monkeypatch.setattr(kubectl, "_ANSWER_SECONDS", 1)
    assert personmae(*arguments) == EXIT_USER_ERROR
    assert "the cluster must be up and reachable from here" in error(capsys)
