"""The plain engine: one process, or DistributedDataParallel over several."""

import contextlib

import torch
import torch.distributed as tdist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from personmae.engine.base import Batch, Engine, set_lr


class NativeEngine(Engine):
    """fp32 parameters and moments; gradients are averaged over ranks while the last micro-batch's backward runs."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, *, grad_accum_steps: int, max_norm: float | None):
        self.module, self.optimizer = module, optimizer
        self._grad_accum_steps, self._max_norm = grad_accum_steps, max_norm
        distributed = tdist.is_initialized() and tdist.get_world_size() > 1
        self._wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True) if distributed else module

    def forward_backward(self, batch: Batch, *, last_micro: bool) -> Batch:
        waits = isinstance(self._wrapped, DistributedDataParallel) and not last_micro
        with self._wrapped.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            losses = self._wrapped(batch)
            (losses["loss"] / self._grad_accum_steps).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def step(self, lr_scale: float) -> Tensor:
        set_lr(self.optimizer, lr_scale)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def close(self) -> None:
        """Nothing is held."""
