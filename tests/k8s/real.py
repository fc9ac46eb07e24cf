"""A real cluster for tests, where PERSONMAE_E2E_KUBECONFIG names one: its administrator, and one who may only submit.

The kubeconfig must be an administrator's, since namespaces, priorities and roles are made. Where the cluster has no nodes, the
pods are processes of this machine (``nodes.py``, which needs root) and the bucket is moto's. Where it has nodes, an image and a
bucket are needed too: PERSONMAE_E2E_IMAGE, and PERSONMAE_E2E_STORE (s3://BUCKET/PREFIX, which this machine and the pods reach
with S3_ENDPOINT_URL and AWS's variables of this process). What is written there stays.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import network
import pytest
from kubelet import free_port
from nodes import Nodes
from sample_requests import ROOT

from launcher.cluster.deployed import INSTANCE
from personmae.system import storage

DIGEST = f"sha256:{'0' * 64}"
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "S3_ENDPOINT_URL")
KINDS = "jobs,deployments,services,configmaps,serviceaccounts,poddisruptionbudgets,roles,rolebindings,pods"
PATIENCE_SECONDS = 600


@dataclass
class Cluster:
    """A namespace of a cluster, its administrator and one who may only submit."""

    admin: str
    operator: str
    namespace: str
    image: str
    store: str
    nodes: Nodes | None
    bucket: dict[str, str]  # variables by which it is reached

    def kubectl(self, *args: str, text: str | None = None) -> str:
        """``kubectl ARGS`` as the administrator."""
        return kubectl(self.admin, "-n", self.namespace, *args, text=text)

    def personmae(self, verb: str, *args: str | Path, code: int = 0) -> str:
        """What ``personmae VERB ARGS`` prints, typed by the operator; it must end with ``code``."""
        command = [sys.executable, "-m", "personmae", verb, *map(str, args), "-n", self.namespace]
        environ = os.environ | {"KUBECONFIG": self.operator, "COLUMNS": "300"}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def state(self, run: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "personmae", "status", run, "-o", "json", "-n", self.namespace]
        environ = os.environ | {"KUBECONFIG": self.operator}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else {"state": done.stderr}

    def left(self, run: str) -> list[str]:
        """What there is in the cluster of a run."""
        return self.kubectl("get", KINDS, "-l", f"{INSTANCE}={run}", "-o", "name", "--ignore-not-found").split()

    def pods(self, run: str) -> dict[str, str]:
        """Names of the trainer's pods that are not going, by index."""
        told = self.kubectl("get", "pods", "-l", f"{INSTANCE}={run},app.kubernetes.io/component=trainer", "-o", "json")
        index = "batch.kubernetes.io/job-completion-index"
        alive = [p for p in json.loads(told)["items"] if not p["metadata"].get("deletionTimestamp")]
        alive = [p for p in alive if p["status"]["phase"] in ("Pending", "Running")]
        return {p["metadata"]["annotations"].get(index, "0"): p["metadata"]["name"] for p in alive}

    def wait_for(self, what: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
        """What ``what`` returns once that is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.CalledProcessError):  # a server that restarts
                if found := what():
                    return found
            time.sleep(0.5)
        told = self.kubectl("get", f"{KINDS},events", "-o", "wide") + (self.nodes.logs() if self.nodes else "")
        raise TimeoutError(told)


def kubectl(config: str, *args: str, text: str | None = None) -> str:
    done = subprocess.run(["kubectl", "--kubeconfig", config, *args], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    done.check_returncode()
    return done.stdout


@pytest.fixture
def cluster(real_cluster: Cluster, monkeypatch: pytest.MonkeyPatch, fresh_s3_client: Callable[[], None]) -> Cluster:
    """The cluster, and its bucket for this process."""
    for name, value in real_cluster.bucket.items():
        monkeypatch.setenv(name, value)
    storage.renew_credentials()
    return real_cluster


@pytest.fixture(scope="session")
def real_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A namespace of its own, for all tests of a session."""
    folder = tmp_path_factory.mktemp("cluster")
    config = os.environ.get("PERSONMAE_E2E_KUBECONFIG")
    if not config:
        pytest.skip("needs a cluster: set PERSONMAE_E2E_KUBECONFIG")
    with contextlib.ExitStack() as ending:
        nodes = None
        if "True" in kubectl(config, "get", "nodes", "-o", "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}"):
            if lacking := [name for name in ("IMAGE", "STORE") if not os.environ.get(f"PERSONMAE_E2E_{name}")]:
                pytest.skip(f"the cluster has nodes: set {' and '.join(f'PERSONMAE_E2E_{name}' for name in lacking)}")
            image, store = os.environ["PERSONMAE_E2E_IMAGE"], os.environ["PERSONMAE_E2E_STORE"]
            bucket = {name: os.environ[name] for name in KEYS if name in os.environ}
        else:
            if lacking := network.missing():
                pytest.skip(f"the cluster has no nodes, and to be some this machine lacks {lacking}")
            nodes = Nodes(config, folder / "nodes")
            ending.callback(nodes.close)
            bucket = ending.enter_context(moto(folder))
            image, store = f"registry.test/personmae@{DIGEST}", "s3://bucket"
        namespace = f"personmae-e2e-{uuid.uuid4().hex[:6]}"
        make_namespace(config, namespace, bucket, folder)
        ending.callback(kubectl, config, "delete", "namespace", namespace, "--wait=false")
        operator = restricted(config, namespace, folder)
        yield Cluster(config, operator, namespace, image, f"{store}/{namespace}", nodes, bucket)
        assert not (nodes and nodes.faults), nodes.faults[0]


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[dict[str, str]]:
    """An S3 server that pods reach, with a bucket; what a client must know of it."""
    endpoint = f"http://{network.GATEWAY}:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", network.GATEWAY, "-p", endpoint.rpartition(":")[2]]
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with open(folder / "s3.log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        for _ in range(600):
            with contextlib.suppress(OSError):
                direct.open(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
                break
            time.sleep(0.2)
        keys = {"S3_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        yield keys | {"NO_PROXY": f"127.0.0.1,{network.GATEWAY}"}
        server.kill()


def make_namespace(config: str, namespace: str, bucket: dict[str, str], folder: Path) -> None:
    """As k8s/README.md says it for a namespace of another name, with the bucket's secret and an account for the operator."""
    shutil.copytree(ROOT / "k8s", folder / "k8s")
    files = [folder / "k8s/overlays/namespace" / name for name in ("kustomization.yaml", "namespace.yaml")]
    for file, line in zip(files, ("namespace: personmae", "name: personmae"), strict=True):
        assert file.read_text().count(f"{line}\n") == 1
        file.write_text(file.read_text().replace(f"{line}\n", f"{line.split(':')[0]}: {namespace}\n"))
    kubectl(config, "apply", "-k", str(files[0].parent))
    data = {name: base64.b64encode(value.encode()).decode() for name, value in bucket.items() if name in KEYS}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "personmae-s3"}, "data": data}
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "operator"}}
    for item in (secret, account):
        kubectl(config, "-n", namespace, "apply", "-f", "-", text=json.dumps(item))
    whom = f"--serviceaccount={namespace}:operator"
    kubectl(config, "-n", namespace, "create", "rolebinding", "submitters", "--role=personmae-submitter", whom)


def restricted(config: str, namespace: str, folder: Path) -> str:
    """A kubeconfig of one who has the role personmae-submitter and no other."""
    told = json.loads(kubectl(config, "config", "view", "--minify", "--flatten", "--raw", "-o", "json"))
    token = kubectl(config, "-n", namespace, "create", "token", "operator", "--duration=6h").strip()
    told["users"] = [{"name": user["name"], "user": {"token": token}} for user in told["users"]]
    (folder / "operator.json").write_text(json.dumps(told))
    return str(folder / "operator.json")
