"""Choices that render, and objects by name."""

from pathlib import Path
from typing import Any

from launcher.choice import Choice

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted(path.parent.name for path in ROOT.glob("k8s/overlays/*/kustomization.yaml"))
DIGEST = "sha256:" + "0123456789abcdef" * 4
PRETRAIN = ["data.shards=s3://bucket/shards", "checkpoint.store=s3://bucket/run"]
FINETUNE = ["root=s3://bucket/market1501.tar", "init=s3://bucket/run", "checkpoint.store=s3://bucket/finetune"]


def choose(overlay: str = "pretrain", **more: Any) -> Choice:
    """A choice that renders: the ViT-B recipe, or fine-tuning on Market-1501."""
    downstream = overlay.startswith("finetune")
    name = "finetune_market1501" if downstream else "quickstart" if overlay == "dev-cpu" else "pretrain_vit_base"
    given: dict[str, Any] = {"overrides": FINETUNE if downstream else PRETRAIN, "image": f"registry.test/personmae:1@{DIGEST}"}
    return Choice(**({"config": ROOT / "configs" / f"{name}.yaml", "overlay": overlay} | given | more))


def by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    found = {(item["kind"], item["metadata"]["name"]): item for item in objects}
    assert len(found) == len(objects)
    return found
