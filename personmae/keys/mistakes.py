"""One line for a mistake in a configuration: the key, its file, the value it takes, and the key that was meant."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from personmae.keys.values import is_model, items_of

_MEANT = {  # names in other programs -> our keys, of which the first that the program has counts
    "amp": ("train.precision",),
    "bf16": ("train.precision",),
    "bs": ("train.global_batch_size", "batch.num_ids"),
    "batch": ("train.global_batch_size", "batch.num_ids"),
    "batch_size": ("train.global_batch_size", "batch.num_ids"),
    "train_batch_size": ("train.global_batch_size", "batch.num_ids"),
    "micro_batch_size": ("train.max_micro_batch_size",),
    "checkpoint_dir": ("run_dir",),
    "clip_grad": ("optim.max_norm",),
    "crop_size": ("model.img_size",),
    "data_dir": ("data.shards", "root"),
    "data_path": ("data.shards", "root"),
    "dataset": ("benchmark", "data.shards"),
    "decoder_depth": ("decoders.depth",),
    "dropout": ("train.drop_path_rate",),
    "dtype": ("train.precision",),
    "ema": ("teacher.momentum",),
    "fp16": ("train.precision",),
    "fp32": ("train.precision",),
    "grad_clip": ("optim.max_norm",),
    "image_size": ("model.img_size",),
    "input_size": ("model.img_size",),
    "iterations": ("train.total_steps", "train.iters_per_epoch"),
    "iters": ("train.total_steps", "train.iters_per_epoch"),
    "learning_rate": ("optim.lr",),
    "logdir": ("run_dir",),
    "mask_ratio": ("mask.ratio",),
    "max_steps": ("train.total_steps", "train.iters_per_epoch"),
    "num_steps": ("train.total_steps", "train.iters_per_epoch"),
    "num_epochs": ("train.epochs",),
    "num_workers": ("data.num_threads",),
    "out": ("run_dir",),
    "output": ("run_dir",),
    "output_dir": ("run_dir",),
    "patch": ("model.patch_size",),
    "pretrained": ("init",),
    "resume_from": ("checkpoint.resume",),
    "save_every": ("checkpoint.every_steps",),
    "save_freq": ("checkpoint.every_steps",),
    "step": ("train.total_steps", "train.iters_per_epoch"),
    "steps": ("train.total_steps", "train.iters_per_epoch"),
    "warmup": ("optim.warmup_fraction",),
    "warmup_epochs": ("optim.warmup_fraction",),
    "wd": ("optim.weight_decay",),
    "weights": ("init",),
    "workers": ("data.num_threads",),
    "world_size": ("engine.fsdp.shard_size",),
    "zero": ("engine.deepspeed.zero_stage",),
}


def explain(kind: type[BaseModel], error: ValidationError, origins: Mapping[str, str], file: str) -> str:
    """The first mistake as one line."""
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"]]
    path, origin = ".".join(keys), origin_of(keys, origins, file)
    if first["type"] == "extra_forbidden":
        return f"unknown key '{path}' in {origin}. The nearest known key is '{nearest_key(kind, _unnumbered(keys))}'"
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        return f"'{'.'.join(keys[:-1])}' in {origin} needs more values. Got {first['input']!r}"
    if first["type"] == "missing":
        return f"'{path}' is required and {file} does not set it. Add it to the file or give {path}=VALUE"
    return f"'{path}' in {origin}: {first['msg'].removeprefix('Value error, ')}. Got {_shortened(first['input'])}"


def origin_of(keys: Sequence[str], origins: Mapping[str, str], file: str) -> str:
    """The file or command line that has set a key or a section around it."""
    prefixes = (".".join(keys[:n]) for n in range(len(keys), 0, -1))
    return next((origins[prefix] for prefix in prefixes if prefix in origins), file)


def nearest_key(kind: type[BaseModel], path: str) -> str:
    """The known key that an unknown one most likely means.

    Names from other programs come first. Otherwise a key should have all the typed words (``img_size`` is
    ``model.img_size``). The last part counts as much as the whole, so that a key without its section is found.
    """
    known, leaf = dotted_keys(kind), path.rpartition(".")[2]
    meant = _MEANT.get(leaf.lower().replace("-", "_"), ()) if leaf not in {key.rpartition(".")[2] for key in known} else ()
    for key in meant:
        if key in known:
            return key
    return max(known, key=lambda key: _likeness(path, key))


def unknown_keys(kind: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of a tree that a model does not know."""
    found = []
    for key, value in values.items():
        field = kind.model_fields.get(key)
        if field is None:
            found.append(f"{prefix}{key}")
        elif isinstance(value, dict) and is_model(field.annotation):
            found += unknown_keys(field.annotation, value, f"{prefix}{key}.")
    return found


def dotted_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys and sections of a model in order. Sections in a list have no number."""
    paths = []
    for name, field in kind.model_fields.items():
        paths.append(f"{prefix}{name}")
        for section in (field.annotation, *items_of(field.annotation)):
            paths += dotted_keys(section, f"{prefix}{name}.") if is_model(section) else []
    return paths


def _unnumbered(keys: Sequence[str]) -> str:
    return ".".join(key for key in keys if not key.isdecimal()) or keys[0]


def _likeness(typed: str, key: str) -> float:
    """From 0 to 3: the similarity of the whole and of the last part, and the share of typed words in the key."""
    whole = difflib.SequenceMatcher(None, typed, key).ratio()
    last = difflib.SequenceMatcher(None, typed.rpartition(".")[2], key.rpartition(".")[2]).ratio()
    words = set(re.split(r"[._-]", typed))
    return whole + last + len(words & set(re.split(r"[._-]", key))) / len(words)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
