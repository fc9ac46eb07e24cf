"""The DeepSpeed engine. Everything that leans on DeepSpeed's own names and defaults is in this file.

Its dict is generated here from plain arguments, so there is one source for every number. Parameters, moments and gradients
stay fp32 on DeepSpeed's side; the module enters bf16 autocast itself.
"""

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from personmae import dist
from personmae.engine.base import Batch, Engine, set_lr
from personmae.errors import UserError


def deepspeed_config(
    *, micro_batch_size: int, grad_accum_steps: int, zero_stage: int, max_norm: float | None, extra: dict[str, Any]
) -> dict[str, Any]:
    """The DeepSpeed dict; ``extra`` is merged last, section by section.

    What DeepSpeed leaves out defaults to is not always harmless: clipping, for one, would be at 1.0.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": max_norm or 0.0,
        "zero_optimization": {"stage": zero_stage},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    for key, value in extra.items():
        if key in _OURS or (key == "zero_optimization" and "stage" in value):
            raise UserError(f"engine.deepspeed.extra must not set '{key}', which follows from the configuration; leave it out")
        merges = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = config[key] | value if merges else value
    return config


# What the rest of the configuration decides, or what portable_state() could not read back.
_OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "bf16", "fp16")


class DeepSpeedEngine(Engine):
    """A module under ``deepspeed.initialize``; the process group must exist."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batch_size: int,
        grad_accum_steps: int,
        max_norm: float | None,
        zero_stage: int,
        extra: dict[str, Any],
    ):
        os.environ.setdefault("LOCAL_RANK", "0")  # asserted even where the process group exists
        deepspeed = _import_deepspeed()
        deepspeed.init_distributed(auto_mpi_discovery=False)
        config = deepspeed_config(
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            zero_stage=zero_stage,
            max_norm=max_norm,
            extra=extra,
        )
        try:
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        except deepspeed.DeepSpeedConfigError as error:
            raise UserError(f"DeepSpeed does not accept engine.deepspeed.extra={extra}: {error}") from None
        self.module, self.optimizer = module, optimizer

    def forward_backward(self, batch: Batch, *, last_micro: bool) -> Batch:
        losses = self._engine(batch)
        self._engine.backward(losses["loss"])
        if not last_micro:
            self._engine.step()  # counts the micro-batch; nothing is updated before the last one
        return {name: loss.detach() for name, loss in losses.items()}

    def step(self, lr_scale: float) -> Tensor:
        set_lr(self.optimizer, lr_scale)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        return norm

    def close(self) -> None:
        self._engine.destroy()


def _import_deepspeed() -> Any:
    if not dist.use_cuda():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops

        # On CPUs init_distributed would compile this op for half a minute and leave files in /dev/shm; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
