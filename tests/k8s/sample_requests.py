"""Requests that render, all sets of components that one may have, and objects by name."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.cluster.request import Request, components

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted(path.parent.name for path in ROOT.glob("k8s/overlays/*/kustomization.yaml"))
DIGEST = "sha256:" + "0123456789abcdef" * 4
PRETRAIN = ["data.shards=s3://bucket/shards", "checkpoint.upload_to=s3://bucket/run"]
EXCLUSIVE = (("spot", "spot-gke"), ("irsa", "gke-workload-identity"), ("rdma", "efa"))
EVERYWHERE = {"s3-secret", "irsa", "gke-workload-identity", "monitoring", "grafana", "network-policy"}  # not of Jobs alone
FINETUNE = ["root=s3://bucket/market1501.tar", "init=s3://bucket/run", "checkpoint.upload_to=s3://bucket/finetune"]


def request_for(overlay: str = "pretrain", **more: Any) -> Request:
    """A request that renders: the ViT-B recipe, or the benchmark that the overlay is for."""
    downstream = overlay.startswith(("finetune", "usl", "uda"))
    name = overlay.replace("-", "_") if downstream else "quickstart" if overlay == "dev-cpu" else "pretrain_vit_base"
    name = name.replace("_", "_to_", 2).replace("_to_", "_", 1) if overlay.startswith("uda") else name
    given: dict[str, Any] = {"overrides": FINETUNE if downstream else PRETRAIN, "image": f"registry.test/personmae:1@{DIGEST}"}
    return Request(**({"config": ROOT / "configs" / f"{name}.yaml", "overlay": overlay} | given | more))


def largest_sets() -> Iterator[tuple[str, ...]]:
    """Every set of components in which none excludes another and to which none can be added."""
    others = [name for name in components() if not any(name in pair for pair in EXCLUSIVE)]
    for picked in itertools.product(*EXCLUSIVE):
        yield (*picked, *others)


def small_sets() -> Iterator[tuple[str, ...]]:
    """No component, each one, and every two of which neither excludes the other."""
    for number in range(3):
        yield from (
            names for names in itertools.combinations(components(), number) if not any({*p} <= {*names} for p in EXCLUSIVE)
        )


def admissible(overlay: str, names: tuple[str, ...]) -> bool:
    """Whether a run of an overlay may have these components together."""
    if overlay == "dev-cpu":
        return not {"nvme-cache", "rdma", "efa"} & {*names}
    if overlay in ("jobset", "trainjob"):
        return {*names} <= EVERYWHERE
    return not (overlay == "pretrain-spot" and "spot-gke" in names)


def by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    found = {(item["kind"], item["metadata"]["name"]): item for item in objects}
    assert len(found) == len(objects)
    return found
