"""Texts of an exported folder: what each file is and how far it agrees, and a model card made from the run's own record."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personmae.reid.retrieval import read_record
from personmae.weights.encoder import Encoder
from personmae.weights.export_check import NUM_IMAGES, Agreement
from personmae.weights.flat import FlatViT


@dataclass(frozen=True, slots=True)
class Written:
    """One file or folder: its path in the exported folder, what it holds, who loads it and how, and what its check found."""

    path: str
    holds: str
    loads: str
    precision: str
    agreement: Agreement


@dataclass(frozen=True, slots=True)
class Scores:
    """mAP and Rank-1 (0 ... 1) of the checkpoint and of an exported file on one benchmark."""

    title: str
    file: str
    checkpoint: dict[str, float]
    exported: dict[str, float]


def readme(
    encoder: Encoder,
    flat: FlatViT | None,
    lacking: str,
    written: Sequence[Written],
    resized: dict[str, Agreement],
    nearest: float,
    scores: Scores | None,
    about: dict[str, Any],
) -> str:
    """The README of the exported folder."""
    config, (height, width) = encoder.config, encoder.config["size"]
    head = (
        f"with its {config['feature']} head" if config["kind"] == "reid" else f"without a head ({config['feature']} of tokens)"
    )
    lines = [
        "# Exported model",
        "",
        f"A {encoder.stored.model['size']} ViT of personmae {head}: RGB images of {height}x{width} pixels (height x width) to",
        f"features of {config['dim']} numbers. The cosine of two features is the similarity of two images.",
        "",
        "| file | holds | weights | cosine with the checkpoint: mean | least | largest difference of a number |",
        "|---|---|---|---|---|---|",
        *(_row(each) for each in written),
        "",
        f"Each file was loaded by the library it is for, and run on {NUM_IMAGES} drawn people. Features were brought to length",
        f"one before they were compared. For scale: the two most alike of these people have a cosine of {nearest:.4f}.",
        *([] if not flat or flat.whole else ["", *_without_head(flat)]),
        *(
            ["", f"There is no file for timm, transformers, reid or TransReID: a plain ViT has not {lacking}."]
            if lacking
            else []
        ),
        "",
        "## How each file is loaded",
        "",
        *(line for each in written for line in (f"`{each.path}`", "", "```python", each.loads, "```", "")),
        "## What the network wants",
        "",
        f"RGB, resized to {height}x{width} with OpenCV's `INTER_CUBIC`, then from 0 ... 1 minus {list(config['mean'])} over",
        f"{list(config['std'])}. `unit.onnx` takes 0 ... 1 and `imagenet.onnx` what is normalised as for ImageNet: they do the",
        "rest. Other ways of resizing change the features of the same 32 crops so much:",
        "",
        "| resized by | cosine: mean | least |",
        "|---|---|---|",
        *(f"| {name} | {found.mean:.5f} | {found.least:.5f} |" for name, found in resized.items()),
        "",
        *_of_scores(scores),
        "## Where it comes from",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        "",
    ]
    return "\n".join(lines)


def _row(each: Written) -> str:
    found = each.agreement
    numbers = f"{found.mean:.7f} | {found.least:.7f} | {found.largest_difference:.1e}"
    return f"| `{each.path}` | {each.holds} | {each.precision} | {numbers} |"


def _without_head(flat: FlatViT) -> list[str]:
    return [
        f"A plain ViT cannot hold {flat.why} of this model. Files that hold the ViT alone were compared with the mean token of",
        "the checkpoint's encoder. Their features are not the model's: use the files that hold the whole model where you can.",
    ]


def _of_scores(scores: Scores | None) -> list[str]:
    if not scores:
        return []
    rows = [
        f"| {name} | {100 * found['mAP']:.2f} | {100 * found['rank1']:.2f} |"
        for name, found in (("the checkpoint, fp32", scores.checkpoint), (f"`{scores.file}`", scores.exported))
    ]
    return [f"## Scores on {scores.title}", "", "| features of | mAP | Rank-1 |", "|---|---|---|", *rows, ""]


# --- the model card ---


def origin(encoder: Encoder) -> dict[str, Any]:
    """Facts of the run that the weights are from, as far as its own files have them."""
    about, where = encoder.stored.about, Path(encoder.stored.where)
    run_dir = where.parent.parent if where.parent.name == "checkpoints" else where
    run = _json(run_dir / "run.json")
    facts = {
        "source": encoder.stored.where,
        "step": about.get("step"),
        "started from": about.get("init"),
        "imported from": about.get("import"),
        "command": run.get("command"),
        "commit of the code": run.get("commit"),
        "seed": run.get("seed"),
        "hardware": _hardware(run.get("hardware")),
        "torch": (run.get("versions") or {}).get("torch"),
    }
    if about.get("whiten"):
        facts["note"] = "its own evaluation whitens features per camera over a whole set, which no file here does"
    return {name: value for name, value in facts.items() if value is not None}


def _hardware(found: dict[str, Any] | None) -> str | None:
    return None if not found else ", ".join(found.get("gpus") or []) or f"{found.get('cores')} cores of {found.get('cpu')}"


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def model_card(encoder: Encoder, flat: FlatViT, agreement: Agreement, about: dict[str, Any]) -> str:
    """The README.md of the transformers folder: a header that the Hugging Face hub reads, and what is known of the model."""
    (height, width), config = encoder.config["size"], encoder.config
    run_dir = Path(encoder.stored.where).parent.parent
    pooling = "output.last_hidden_state[:, 0]" if flat.pool == "token" else "output.last_hidden_state[:, 1:].mean(dim=1)"
    what = "the whole model, its head put into the last norm" if flat.whole else f"the ViT alone, without {flat.why}"
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: image-feature-extraction",
            "tags:",
            *(f"- {tag}" for tag in ("person-re-identification", "personmae", "vit")),
            "---",
            "",
            f"# PersonMAE, ViT-{encoder.stored.model['size']}",
            "",
            "A Vision Transformer for person re-identification, pre-trained as in PersonMAE (arXiv 2311.04496).",
            f"This folder holds {what}. On {NUM_IMAGES} drawn people the cosine with the checkpoint is at least",
            f"{agreement.least:.7f}.",
            "",
            "## Use",
            "",
            "```python",
            "import torch",
            "from transformers import ViTImageProcessor, ViTModel",
            "",
            'processor = ViTImageProcessor.from_pretrained(".")',
            'model = ViTModel.from_pretrained(".", add_pooling_layer=False).eval()',
            "with torch.no_grad():",
            '    output = model(**processor(images, return_tensors="pt"))',
            f"features = torch.nn.functional.normalize({pooling}, dim=1)",
            "```",
            "",
            f"Images are person crops, resized to {height}x{width} (height x width). Mean {list(config['mean'])}, deviation",
            f"{list(config['std'])}.",
            "",
            "## Training",
            "",
            *(f"- {name}: {value}" for name, value in about.items()),
            "",
            *_results(run_dir),
            *_configuration(run_dir),
            "## Limits",
            "",
            "Search results are a ranking, not proof of identity. Scores on other people, cameras or clothes than those of the",
            "training may be far lower. Use it only where images of people may be compared.",
            "",
        ]
    )


def _results(run_dir: Path) -> list[str]:
    record = read_record(run_dir)
    if not record or "mAP" not in record:
        return ["## Results", "", "The run has no result on a benchmark.", ""]
    scores = " | ".join(f"{100 * record[name]:.1f}" for name in ("mAP", "rank1", "rank5", "mINP"))
    data = record.get("benchmark_title") or record.get("benchmark")
    rows = ["| benchmark | mAP | Rank-1 | Rank-5 | mINP |", "|---|---|---|---|---|", f"| {data} | {scores} |"]
    return ["## Results", "", *rows, ""]


def _configuration(run_dir: Path) -> list[str]:
    try:
        text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        return []
    return ["## Configuration", "", "```yaml", text.rstrip(), "```", ""]
