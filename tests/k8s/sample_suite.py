"""A suite of an encoder and two benchmarks, as a request and as it is in a cluster once it is submitted."""

import copy
import functools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from apiobjects import Objects
from object_cluster import ObjectCluster, Server, account, serve
from sample_requests import DIGEST, ROOT

from launcher.cluster import deployed, suite
from launcher.cluster.api import Api
from launcher.cluster.render import Rendered
from launcher.cluster.request import Request

SCORES = {"mAP": 0.5, "rank1": 0.625, "rank5": 0.75, "rank10": 0.875, "mINP": 0.25, "benchmark": "market1501"}
STAGES = [
    {
        "name": "pre",
        "config": str(ROOT / "configs/pretrain_vit_base.yaml"),
        "set": ["data.shards=s3://b/l"],
        "nodes": [1, 2],
        "gpus": 8,
    },
    {"name": "market", "after": "pre", "config": str(ROOT / "configs/finetune_market1501.yaml"), "set": ["root={market}"]},
    {"name": "duke", "after": "pre", "config": str(ROOT / "configs/finetune_occluded_duke.yaml"), "set": ["root=s3://b/d.tar"]},
]
FILE: dict[str, Any] = {"name": "s", "results": "s3://results/s", "places": {"market": "s3://b/m.tar"}, "stages": STAGES}


def request_in(folder: Path, **more: Any) -> Request:
    """The suite, written to a folder."""
    (folder / "suite.yaml").write_text(yaml.safe_dump(FILE))
    return Request(folder / "suite.yaml", image=f"registry.test/personmae@{DIGEST}", **more)


@dataclass
class Submitted:
    """A suite in a cluster, and what its dispatcher has: a plan and the API server."""

    cluster: ObjectCluster
    server: Server
    plan: dict[str, Any]
    api: Api

    @property
    def objects(self) -> Objects:
        return self.cluster.objects

    def jobs(self) -> list[str]:
        return [name for kind, name in self.objects.held if kind == "Job"]

    def end(self, stage: str, kind: str = "Complete") -> None:
        """Have a stage's Job end as a controller would tell it."""
        condition = {"type": kind, "status": "True", "reason": "PodFailurePolicy", "message": "exit code 78"}
        self.objects.patch("Job", f"s-{stage}-trainer", {"status": {"conditions": [condition]}})

    def memory(self) -> dict[str, str]:
        """What is remembered, by stage."""
        data = self.objects.get("ConfigMap", "s-state")["data"]
        return {key.removeprefix("stage."): text for key, text in data.items() if key.startswith("stage.")}


@functools.cache
def _rendered(components: tuple[str, ...]) -> tuple[Rendered, list[Rendered]]:
    with tempfile.TemporaryDirectory() as folder:
        return suite.render_suite(request_in(Path(folder), components=components))


@contextmanager
def submitted(folder: Path, components: tuple[str, ...] = ()) -> Iterator[Submitted]:
    """What ``personmae submit`` leaves in a cluster."""
    cluster = ObjectCluster()
    dispatching, runs = copy.deepcopy(_rendered(components))
    names = [rendered.run for rendered in (dispatching, *runs)]
    for rendered in suite.first_runs(dispatching, runs):
        deployed.create(cluster, names, rendered.objects, rendered.workload)
    with serve(cluster.objects) as server:
        api = Api(server.url, account(folder / "account", "s-trainer"))
        yield Submitted(cluster, server, json.loads(suite.plan_of(dispatching)), api)
