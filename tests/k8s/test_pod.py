"""The commands of rendered pods, run here as the kubelet would: init container, store, trainer; the bucket is real HTTP."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from choices import PRETRAIN, ROOT, by_name, choose

from launcher import objects, render

pytestmark = [pytest.mark.integration, pytest.mark.slow]
TRAINING = ["batch.num_ids=4", "train.epochs=2", "train.precision=fp32", "train.log_every=1", "checkpoint.every_steps=2"]


class Node:
    """Runs containers of a pod with their commands, variables and configuration, below a directory of its own."""

    def __init__(self, rendered: render.Rendered, folder: Path, store_port: int) -> None:
        names, run = by_name(rendered.objects), rendered.run
        pods = [o["spec"]["template"]["spec"] for o in rendered.objects if o["kind"] in ("Job", "Deployment")]
        self._containers = [c for pod in pods for c in [*pod.get("initContainers", []), *pod["containers"]]]
        self._variables = names["ConfigMap", f"{run}-run"]["data"] | {"RUN": run, "POD_IP": "127.0.0.1"}
        self._places = {
            f"{run}-store": "127.0.0.1",
            "/scratch": str(folder / "scratch"),
            "/etc/personmae": str(folder / "etc"),
            "29400": str(store_port),
            "9400": str(free_port()),
        }
        (folder / "etc").mkdir(parents=True)
        (folder / "scratch").mkdir()
        text = names["ConfigMap", f"{rendered.run}-config"]["data"]["config.yaml"]
        (folder / "etc" / "config.yaml").write_text(self._here(text))
        self.metrics = f"http://127.0.0.1:{self._places['9400']}"

    def start(self, name: str) -> subprocess.Popen[str]:
        container = next(c for c in self._containers if c["name"] == name)
        command = [*container["command"], *container.get("args", [])]
        assert command[:3] == ["/usr/bin/tini", "--", "python"]
        expanded = [re.sub(r"\$\((\w+)\)", lambda m: self._variables[m[1]], part) for part in command[3:]]
        own = {e["name"]: self._here(e["value"]) for e in container["env"] if "value" in e}
        given = self._variables if "envFrom" in container else {}
        environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | given | own
        return subprocess.Popen(
            [sys.executable, *map(self._here, expanded)],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _here(self, text: str) -> str:
        for there, here in self._places.items():
            text = text.replace(there, here)
        return text


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def bucket(s3_server: Any, tmp_path: Path) -> str:
    """A bucket with a small benchmark as a tar."""
    from personmae.data.synthetic import SynthSettings, write_synthetic

    few = {f"{name}_{split}_ids": 8 for name in ("market", "occluded_duke") for split in ("train", "test")}
    settings = SynthSettings(pool_images=4, pool_identities=2, market_distractors=4, market_junk=3, **few)
    write_synthetic(tmp_path / "data", settings, num_processes=1)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(tmp_path / "data" / "market1501", arcname=".")
    s3_server.bucket("bucket")
    s3_server.client.put_object(Bucket="bucket", Key="market1501.tar", Body=packed.getvalue())
    return "bucket"


@pytest.fixture
def node(bucket: str, tmp_path: Path) -> Node:
    places = [f"root=s3://{bucket}/market1501.tar", f"checkpoint.store=s3://{bucket}/runs/market"]
    choice = choose("finetune-market1501", config=ROOT / "configs" / "quickstart_random.yaml", overrides=[*places, *TRAINING])
    return Node(render.render(choice), tmp_path, free_port())


def test_a_rendered_benchmark_fetches_trains_stops_resumes_elsewhere_and_leaves_its_result(
    node: Node, bucket: str, tmp_path: Path, s3_server: Any
) -> None:
    fetch = node.start("fetch")
    assert fetch.communicate(timeout=60)[0].startswith("fetched s3://bucket/market1501.tar")
    assert fetch.returncode == 0
    store = node.start("store")
    try:
        assert store.stdout
        assert "serving" in store.stdout.readline()
        trainer = node.start("trainer")
        healthy = answers(f"{node.metrics}/healthz")
        wait_for(lambda: any(key.endswith("manifest.json") for key in s3_server.keys(bucket)), trainer)
        trainer.terminate()  # the node is taken away
        output = trainer.communicate(timeout=60)[0]
        assert trainer.returncode in (75, 0), output  # 0: it was done before the signal came
        assert healthy
        subprocess.run(["rm", "-rf", tmp_path / "scratch" / "run"], check=True)  # the next pod is on another node
        trainer = node.start("trainer")
        output = trainer.communicate(timeout=120)[0]
        assert trainer.returncode == 0, output
        assert "result: s3://bucket/runs/market/result.json" in output
        assert "resuming at step" in output or "complete" in output, output
    finally:
        store.terminate()
        store.communicate(timeout=10)
    assert 0 < json.loads(objects.read("s3://bucket/runs/market/result.json") or b"")["mAP"] <= 1


def test_two_rendered_pods_train_together_and_go_on_when_one_is_taken_away(
    shard_dir: Path, tmp_path: Path, s3_server: Any
) -> None:
    s3_server.bucket("bucket")
    for path in shard_dir.iterdir():
        s3_server.client.upload_file(str(path), "bucket", f"shards/{path.name}")
    steps = ["train.global_batch_size=16", "train.total_steps=60", "train.log_every=1", "train.precision=fp32"]
    more = ["data.shuffle_block_size=32", "data.num_threads=1", "engine.name=native", "checkpoint.every_steps=5"]
    choice = choose("dev-cpu", nodes=(1, 2), overrides=[*PRETRAIN, *steps, *more], name="run")
    port, rendered = free_port(), render.render(choice)
    nodes = [Node(rendered, tmp_path / name, port) for name in ("a", "b")]
    store = nodes[0].start("store")
    try:
        assert store.stdout
        assert "serving" in store.stdout.readline()
        trainers = [node.start("trainer") for node in nodes]
        wait_for(lambda: any(key.endswith("manifest.json") for key in s3_server.keys("bucket")), trainers[0])
        trainers[1].terminate()
        gone = trainers[1].communicate(timeout=60)[0]
        assert trainers[1].returncode == 75, gone
        output = trainers[0].communicate(timeout=120)[0]
        assert trainers[0].returncode == 0, output
    finally:
        store.terminate()
        store.communicate(timeout=10)
    assert "round 1: 2 ranks" in output
    assert re.search(r"round \d+: 1 ranks", output)
    assert "pretrain 60/60" in output
    assert any(key == "run/step-00000060/manifest.json" for key in s3_server.keys("bucket"))


def wait_for(arrived: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait a minute at most, while a process is alive."""
    for _ in range(600):
        if arrived():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise TimeoutError


def answers(url: str) -> bool:
    """Whether a probe is answered within half a minute, however."""
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return True
        except urllib.error.HTTPError as error:
            error.close()
            return True
        except OSError:
            time.sleep(0.1)
    return False
