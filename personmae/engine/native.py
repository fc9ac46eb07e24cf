"""The plain engine: one process, or DistributedDataParallel over several."""

import contextlib
from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
import torch.distributed as tdist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from personmae.engine.base import (
    Batch,
    Engine,
    PortableState,
    Update,
    full_shapes,
    guarded_loss,
    guarded_update,
    load_replicated,
    replicated_state,
    require_fit,
    total_norm,
)

_KNOWN = signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers"  # the old name warns


class NativeEngine(Engine):
    """fp32 parameters and moments. Gradients are averaged over ranks while the last micro-batch's backward runs.

    Where the module's work is replayed as CUDA graphs (``is_graphed``), gradients and losses get memory of their own: the next
    replay writes over the graphs'.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        grad_accum_steps: int,
        max_norm: float | None,
        is_graphed: bool = False,
    ):
        self.module, self.optimizer = module, optimizer
        self._grad_accum_steps, self._max_norm, self._is_graphed = grad_accum_steps, max_norm, is_graphed
        if is_graphed:
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self._shapes = full_shapes(module)
        distributed = tdist.is_initialized() and tdist.get_world_size() > 1
        # Buffers stay each rank's own: running statistics are of what it has seen, and dist.average_buffers makes one of them.
        self._wrapped = module
        if distributed:
            options: Any = {_SYNC_BUFFERS: False}
            self._wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True, **options)

    def forward_backward(self, batch: Batch, *, last_micro: bool) -> Batch:
        waits = isinstance(self._wrapped, DistributedDataParallel) and not last_micro
        with self._wrapped.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            losses = self._wrapped(batch)
            (guarded_loss(losses["loss"]) / self._grad_accum_steps).backward()
        return {name: loss.detach().clone() if self._is_graphed else loss.detach() for name, loss in losses.items()}

    def step(self, lr_scale: float) -> Update:
        norm = total_norm(p.grad for p in self.module.parameters() if p.grad is not None)
        done = guarded_update(self.optimizer, lr_scale, norm, self._max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self._is_graphed)
        return done

    @contextlib.contextmanager
    def full_params(self, module: nn.Module) -> Iterator[list[Tensor]]:
        yield list(module.parameters())

    def portable_state(self, *, spread: bool = False) -> PortableState | None:
        return replicated_state(self.module, self.optimizer, spread=spread)

    def load_portable(self, state: PortableState) -> None:
        require_fit(self._shapes, state)
        load_replicated(self.module, self.optimizer, state)

    def close(self) -> None:
        """Nothing is held."""
