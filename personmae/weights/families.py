"""Which project a file of weights comes from, what has to be refused, and the names of CLIP in timm's words."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from personmae.errors import UserError

Triple = tuple[float, float, float]
IMAGENET: Final[tuple[Triple, Triple]] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF: Final[tuple[Triple, Triple]] = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
OPENAI: Final[tuple[Triple, Triple]] = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PREFIXES: Final = ("backbone.", "image_encoder.", "visual.", "base.")  # of an encoder among other things
_ANCHORS: Final = ("cls_token", "class_embedding", "patch_embed.proj.weight", "patch_embed.conv.0.weight", "conv1.weight")
_PRETRAINING: Final = "as its pre-training had. Fine-tuning there goes on with 0.5 and 0.5"


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of a project's weights.

    ``normalisation`` is (mean, std), ``why`` where it comes from. ``pool`` is how the project itself reads the tokens. None is
    for encoders of masked images, whose class token has no loss. ``finetuned``: it has seen labels of people.
    """

    name: str
    normalisation: tuple[Triple, Triple]
    why: str
    pool: str | None = "cls"
    finetuned: bool = False


def strip(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """The encoder's tensors without their prefix, all others, and the prefix."""
    named = {re.sub(r"^(module\.)+", "", name): tensor for name, tensor in tensors.items()}
    prefix = next((p for p in PREFIXES if any(p + anchor in named for anchor in _ANCHORS)), "")
    inner = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    return inner, {name: tensor for name, tensor in named.items() if not name.startswith(prefix)}, prefix


# --- what cannot be read ---

_REASONS: Final = (
    (r"relative_position_bias_table|^stages\.|semantic_embed|^layers\.\d+\.(blocks|downsample)", "it is a Swin transformer"),
    (r"^patch_embed\.(conv|backbone)\.", "its patches come from a convolutional stem (the ICS variant)"),
    (r"^rope|rotary|freqs_cis", "it has rotary positions (RoPE)"),
    (r"\.ls[12]\.|\.gamma_?[12]$", "its blocks have a layer scale"),
    (r"\.(q_norm|k_norm)\.", "its attention normalises queries and keys"),
    (r"^dist_token$", "it has a second class token, for distillation"),
    (r"^layer1\.\d|^(bn1|layer4)\.", "it is a convolutional network"),
    (r"^layers\.\d+\.(ln1|attn|ffn)", "its blocks have the names of mmpretrain"),
)


def require_plain(names: Collection[str], where: str) -> None:
    """Raise a UserError, with the reason, where names are not those of a plain Vision Transformer with a class token."""
    reasons = [reason for pattern, reason in _REASONS if any(re.search(pattern, name) for name in names)]
    if not reasons and "patch_embed.proj.weight" not in names:
        reasons = [f"it has no patch embedding, and its first names are {', '.join(sorted(names)[:3])}"]
    if not reasons and "cls_token" not in names:
        reasons = ["it has no class token"]
    if reasons:
        raise UserError(f"a plain Vision Transformer with a class token is required. {where} is none: {' and '.join(reasons)}")


# --- names ---

_CLIP: Final = (
    ("transformer.resblocks.", "blocks."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("conv1.", "patch_embed.proj."),
)


def is_clip(names: Collection[str]) -> bool:
    """Whether an encoder has CLIP's names."""
    return "class_embedding" in names


def from_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's image encoder by timm's names and shapes."""
    renamed = {_renamed(name): tensor for name, tensor in tensors.items()}
    renamed["cls_token"] = renamed.pop("class_embedding").reshape(1, 1, -1)
    renamed["pos_embed"] = renamed.pop("positional_embedding")[None]
    return renamed


def _renamed(name: str) -> str:
    for theirs, ours in _CLIP:
        name = name.replace(theirs, ours)
    return name


def in_timms_names(inner: dict[str, Tensor], outer: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], str | None]:
    """An encoder's tensors by timm's names, and what to say where some of them were exchanged.

    TransReID's encoder with parts (JPM) does not run its own last block. That of the branch that sees the whole person takes
    its place, with its norm.
    """
    if is_clip(inner):
        return from_clip(inner), None
    block = {name.removeprefix("b1.0."): tensor for name, tensor in outer.items() if name.startswith("b1.0.")}
    norm = {name.removeprefix("b1.1."): tensor for name, tensor in outer.items() if name.startswith("b1.1.")}
    if prefix != "base." or not block:
        return inner, None
    last = depth_of(inner) - 1
    branch = {f"blocks.{last}.{n}": t for n, t in block.items()} | {f"norm.{n}": t for n, t in norm.items()}
    return inner | branch, f"block {last} and the norm are those of b1, the branch that sees the whole person"


def depth_of(names: Iterable[str]) -> int:
    """How many blocks there are."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(r"blocks\.(\d+)\.", name))), default=-1)


# --- projects ---


def identify(
    names: Collection[str], prefix: str, way: Collection[str], beside: Collection[str], *, tall: bool, fixed: bool
) -> Family:
    """The family of an encoder by the names of its tensors and of what was around them.

    ``tall``: its images were higher than wide. ``fixed``: its positions are sines and cosines.
    """
    if prefix == "image_encoder.":
        return Family("CLIP-ReID", HALF, "as its fine-tuning had", finetuned=True)
    if "norm_pre.weight" in names:
        return Family("CLIP", OPENAI, "as OpenAI's CLIP had")
    if prefix == "base.":
        name = "PASS, fine-tuned" if "part_token1" in names else "TransReID or its kin, fine-tuned"
        return Family(name, HALF, "as its fine-tuning had", finetuned=True)
    if "part_token1" in names:
        return Family("PASS", IMAGENET, _PRETRAINING)
    if fixed:
        return Family("HAP" if tall else "MAE", IMAGENET, "as its pre-training had", pool=None)
    if tall:
        known = {"ibot_loss": "PersonViT", "dino_loss": "TransReID-SSL"}
        by_loss = next((name for key, name in known.items() if key in beside), None)
        name = by_loss or ("CION" if set(beside) == {"teacher"} else "TransReID-SSL, PersonViT or CION")
        return Family(name, IMAGENET, _PRETRAINING)
    if "teacher" in way:
        return Family("DINO", IMAGENET, "as its pre-training had")
    return Family("a plain ViT", IMAGENET, "ImageNet's, since the file does not say. Give --mean and --std where it had others")
