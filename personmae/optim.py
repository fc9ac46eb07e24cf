"""Parameter groups and schedules: pure functions of the step, so a resumed run continues where it was."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def param_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    layer_id: Callable[[str], int] | None = None,
    num_layers: int = 0,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for AdamW: no decay on vectors, tokens and positions. With ``layer_id``, lr * layer_decay^(num_layers - layer_id).

    Each group keeps its own peak as ``base_lr`` and ``base_weight_decay``. Schedules multiply those.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        layer = layer_id(name) if layer_id else num_layers
        decays = parameter.ndim > 1 and not name.endswith(("_token", "pos_embed"))
        group = groups.setdefault((layer, decays), {"params": []})
        group["params"].append(parameter)
        group["base_lr"] = group["lr"] = lr * layer_decay ** (num_layers - layer)
        group["base_weight_decay"] = group["weight_decay"] = weight_decay if decays else 0.0
    return list(groups.values())


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW, eps 1e-8."""
    return torch.optim.AdamW(groups, betas=betas, eps=1e-8, fused=True)


def sgd(groups: list[dict[str, Any]], momentum: float) -> torch.optim.SGD:
    """Fused SGD with momentum, as the unsupervised and the TransReID recipes have it."""
    optimizer = torch.optim.SGD(groups, momentum=momentum, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Torch makes it uninitialised at the first update and fills it there. Where that one is skipped it stays so.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lr_scale_at(step: int, total_steps: int, *, warmup_steps: int, min_ratio: float) -> float:
    """Linear warm-up from 0, then half a cosine to ``min_ratio``, as a share of the peak learning rate."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
