"""The contract between a program and whatever trains its module; it knows no model.

Schedules, the teacher, the data cursor, checkpoint files and metrics live outside, once.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from personmae import dist
from personmae.errors import UserError

Batch = dict[str, Tensor]


class Step(NamedTuple):
    """What an update came to; scalars on the device, so that nothing waits for them."""

    grad_norm: Tensor  # of the mean gradient over the global batch, before clipping
    skipped: Tensor  # 1 where that norm is not finite and nothing was changed, else 0


@dataclass(frozen=True, slots=True)
class PortableState:
    """What a run needs besides its data cursor, by parameter name and without regard to ranks."""

    params: dict[str, Tensor]  # fp32 parameters, and the buffers of the state dict
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    num_updates: int


class Engine(ABC):
    """Trains ``module``, whose ``forward(batch)`` returns a dict with a scalar "loss" that is a mean over the batch.

    Parameters, accumulated gradients and moments are fp32; a module that wants bf16 enters autocast itself. The optimizer is
    a fused AdamW. Every method is called by all ranks together.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def forward_backward(self, batch: Batch, *, last_micro: bool) -> Batch:
        """Losses of one micro-batch, detached and on the device; gradients accumulate as means over the global batch."""

    @abstractmethod
    def step(self, lr_scale: float) -> Step:
        """Update the parameters with ``lr_scale`` times each group's peak rate, unless a gradient is not finite."""

    @abstractmethod
    def full_params(self, module: nn.Module) -> AbstractContextManager[list[Tensor]]:
        """The whole fp32 parameters of ``module``, a part of the engine's, in their order; they are only to be read."""

    @abstractmethod
    def portable_state(self) -> PortableState | None:
        """The state by parameter name on the first rank, to be copied before the next step; None on the others.

        What a rank holds whole are the live tensors on their device; what had to be gathered is on the CPU.
        """

    @abstractmethod
    def load_portable(self, state: PortableState) -> None:
        """Take over parameters and moments, whichever engine and world size wrote them; every rank has the whole state.

        Raises:
            UserError: names or shapes are not the module's.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what the engine holds beyond memory."""

    def any(self, flag: bool) -> bool:
        """True on all ranks when it is True on one."""
        return dist.any_rank(flag)


Shapes = dict[str, torch.Size]


def full_shapes(module: nn.Module) -> Shapes:
    """Shapes of a state dict, taken before an engine shards it.

    Raises:
        UserError: a parameter is not fp32.
    """
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(f"engines train fp32 parameters, {name} is {parameter.dtype}; let the module enter autocast itself")
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def require_fit(shapes: Shapes, state: PortableState) -> None:
    """Raise a UserError unless a state has the names and shapes of a module."""
    given = {name: tensor.shape for name, tensor in state.params.items()}
    wrong = [name for name in sorted(shapes | given) if shapes.get(name) != given.get(name)]
    for moments in (state.exp_avg, state.exp_avg_sq):
        wrong += [name for name, tensor in moments.items() if tensor.shape != shapes.get(name)]
    wrong += sorted(state.exp_avg.keys() ^ state.exp_avg_sq.keys())
    if wrong:
        raise UserError(
            f"a saved state must have the module's names and shapes; {len(wrong)} differ ({', '.join(wrong[:3])}): "
            "use the configuration it was trained with"
        )


def require_whole(engine: Engine, shapes: Shapes) -> None:
    """Raise a UserError unless a sharding engine can give back every parameter whole: an average over shards would be wrong."""
    with engine.full_params(engine.module) as params:
        for (name, _), whole in zip(engine.module.named_parameters(), params, strict=True):
            if whole.shape != shapes[name] or whole.dtype != torch.float32:
                raise UserError(
                    f"the engine must give {name} back as fp32 {tuple(shapes[name])} and gives {whole.dtype} "
                    f"{tuple(whole.shape)}; use engine.name=native, or DeepSpeed at ZeRO stage 2 or less"
                )


def guarded_update(optimizer: torch.optim.Optimizer, lr_scale: float, grad_norm: Tensor, max_norm: float | None) -> Step:
    """Tell a fused optimizer how its next ``step()`` is to go: rates, clipping, and not at all where the norm is NaN or inf.

    A fused AdamW reads ``found_inf`` and ``grad_scale``, by which it divides gradients, on the device. Both are meant for
    fp16's loss scaling; here they make the guard and the clipping free of a wait and of a pass over the gradients.
    """
    assert optimizer.defaults.get("fused"), "only a fused optimizer reads found_inf"
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_scale
    skipped = 1.0 - grad_norm.isfinite().float()
    scale = None if max_norm is None else ((grad_norm + 1e-6) / max_norm).clamp(min=1.0)
    optimizer.__dict__.update(found_inf=skipped, grad_scale=scale)
    return Step(grad_norm, skipped)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all elements of some tensors."""
    return torch.nn.utils.get_total_norm(list(tensors))


def replicated_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> PortableState | None:
    """The portable state where every rank holds all of it."""
    if not dist.is_first():
        return None
    moments: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
    num_updates = 0
    for name, parameter in module.named_parameters():
        if state := optimizer.state.get(parameter):
            num_updates = int(state["step"])
            for kind, kept in moments.items():
                kept[name] = state[kind].detach()
    params = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    return PortableState(params, **moments, num_updates=num_updates)


def load_replicated(module: nn.Module, optimizer: torch.optim.Optimizer, state: PortableState) -> None:
    """Take over a portable state where every rank holds all of it."""
    module.load_state_dict(state.params)
    optimizer.state.clear()
    for name, parameter in module.named_parameters():
        if name in state.exp_avg:
            optimizer.state[parameter] = {
                "step": step_tensor(state.num_updates, parameter.device),
                "exp_avg": state.exp_avg[name].to(parameter.device, copy=True),
                "exp_avg_sq": state.exp_avg_sq[name].to(parameter.device, copy=True),
            }


def step_tensor(num_updates: int, device: torch.device) -> Tensor:
    """A step counter as fused AdamW keeps it."""
    return torch.tensor(float(num_updates), device=device)
