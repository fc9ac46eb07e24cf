"""The contract between a program and whatever trains its module. It knows no model.

Schedules, the teacher, the data cursor, checkpoint files and metrics live outside, once.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as tdist
from torch import Tensor, nn

from personmae import dist
from personmae.errors import UserError

Batch = dict[str, Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class Update(NamedTuple):
    """What an update came to. Scalars on the device, so that nothing waits for them."""

    grad_norm: Tensor  # of the mean gradient over the global batch, before clipping
    skipped: Tensor  # 1 where that norm or a rank's loss is not finite and nothing was changed, else 0


@dataclass(frozen=True, slots=True)
class PortableState:
    """What a run needs besides its data cursor, or a rank's share of it: whole tensors by parameter name."""

    params: dict[str, Tensor]  # fp32 parameters, and the buffers of the state dict
    moments: dict[str, dict[str, Tensor]]  # what the optimizer keeps, by its own names: exp_avg and exp_avg_sq for AdamW
    num_updates: int


class Engine(ABC):
    """Trains ``module``, whose ``forward(batch)`` returns a dict with a scalar "loss" that is a mean over the batch.

    Parameters, accumulated gradients and moments are fp32. A module that wants bf16 enters autocast itself. The optimizer is
    a fused AdamW, with the native engine also a fused SGD. Every method is called by all ranks together.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    is_sharded: bool = False  # whether no rank holds all of the state. Then all ranks had better write it together

    @abstractmethod
    def forward_backward(self, batch: Batch, *, last_micro: bool) -> Batch:
        """Losses of one micro-batch, detached and on the device. Gradients accumulate as means over the global batch."""

    @abstractmethod
    def step(self, lr_scale: float) -> Update:
        """Update the parameters with ``lr_scale`` times each group's peak rate, unless a loss or gradient is not finite."""

    @abstractmethod
    def full_params(self, module: nn.Module) -> AbstractContextManager[list[Tensor]]:
        """The whole fp32 parameters of ``module``, a part of the engine's, in their order. They are only to be read."""

    @abstractmethod
    def portable_state(self, *, spread: bool = False) -> PortableState | None:
        """The state by parameter name on the first rank, to be copied before the next step. None on the others.

        With ``spread`` each rank has the share that ``owners`` gives it instead, and at no time more than that and one tensor.
        What a rank holds whole are the live tensors on their device. What had to be gathered is on the CPU.
        """

    @abstractmethod
    def load_portable(self, state: PortableState) -> None:
        """Take over parameters and moments, whichever engine and world size wrote them.

        Every rank is given the whole state, which is read a tensor at a time: mapped from files it takes no memory.

        Raises:
            UserError: names or shapes are not the module's.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what the engine holds beyond memory."""


Shapes = dict[str, torch.Size]


def full_shapes(module: nn.Module) -> Shapes:
    """Shapes of a state dict, taken before an engine shards it.

    Raises:
        UserError: a parameter is not fp32.
    """
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(f"engines train fp32 parameters, {name} is {parameter.dtype}. Let the module enter autocast itself")
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def require_fit(shapes: Shapes, state: PortableState) -> None:
    """Raise a UserError unless a state has the names and shapes of a module."""
    given = {name: tensor.shape for name, tensor in state.params.items()}
    wrong = [name for name in sorted(shapes | given) if shapes.get(name) != given.get(name)]
    for moments in state.moments.values():
        wrong += [name for name, tensor in moments.items() if tensor.shape != shapes.get(name)]
    wrong += sorted({name for one in state.moments.values() for other in state.moments.values() for name in one.keys() - other})
    if wrong:
        raise UserError(
            f"a saved state must have the module's names and shapes. {len(wrong)} differ ({', '.join(wrong[:3])}): "
            "use the configuration it was trained with"
        )


def require_whole(engine: Engine, shapes: Shapes) -> None:
    """Raise a UserError unless a sharding engine can give back every parameter whole: an average over shards would be wrong."""
    with engine.full_params(engine.module) as params:
        for (name, _), whole in zip(engine.module.named_parameters(), params, strict=True):
            if whole.shape != shapes[name] or whole.dtype != torch.float32:
                raise UserError(
                    f"the engine must give {name} back as fp32 {tuple(shapes[name])} and gives {whole.dtype} "
                    f"{tuple(whole.shape)}. Use engine.name=native, or DeepSpeed at ZeRO stage 2 or less"
                )


def guarded_loss(loss: Tensor) -> Tensor:
    """The same loss, with a gradient that is NaN where the loss is not finite: so the guard over gradients sees both.

    A gradient may well be finite where its loss is not, as that of a squared error that overflows.
    """
    return loss * (1.0 + 0.0 * loss.detach())


def guarded_update(optimizer: torch.optim.Optimizer, lr_scale: float, grad_norm: Tensor, max_norm: float | None) -> Update:
    """Tell a fused optimizer how its next ``step()`` is to go: rates, clipping, and not at all where the norm is NaN or inf.

    A fused optimizer reads ``found_inf`` and ``grad_scale``, by which it divides gradients, on the device. Both are meant for
    fp16's loss scaling. Here they make the guard and the clipping free of a wait and of a pass over the gradients.
    """
    assert optimizer.defaults.get("fused"), "only a fused optimizer reads found_inf"
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_scale
    skipped = 1.0 - grad_norm.isfinite().float()
    scale = None if max_norm is None else ((grad_norm + 1e-6) / max_norm).clamp(min=1.0)
    optimizer.__dict__.update(found_inf=skipped, grad_scale=scale)
    return Update(grad_norm, skipped)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all elements of some tensors."""
    return torch.nn.utils.get_total_norm(list(tensors))


def owners(shapes: Mapping[str, torch.Size], *, spread: bool) -> dict[str, int]:
    """The rank that gives each tensor to a portable state: the first, or with ``spread`` any, so that all give about as much.

    The largest come first, each to the rank that has the least by then. All ranks find the same.
    """
    loads = [0] * (tdist.get_world_size() if spread and tdist.is_initialized() else 1)
    found = {}
    for name in sorted(shapes, key=lambda name: (-shapes[name].numel(), name)):
        found[name] = rank = loads.index(min(loads))
        loads[rank] += shapes[name].numel()
    return found


def own_part(tensors: Mapping[str, Tensor], *, spread: bool) -> dict[str, Tensor]:
    """Of tensors that all ranks hold alike, those that this one gives to a portable state."""
    if not spread:
        return dict(tensors) if dist.is_first() else {}
    given = owners({name: tensor.shape for name, tensor in tensors.items()}, spread=True)
    return {name: tensor for name, tensor in tensors.items() if given[name] == rank()}


def rank() -> int:
    """This process's rank, 0 where there is no process group."""
    return tdist.get_rank() if tdist.is_initialized() else 0


def replicated_state(module: nn.Module, optimizer: torch.optim.Optimizer, *, spread: bool) -> PortableState | None:
    """The portable state where every rank holds all of it."""
    if not (spread or dist.is_first()):
        return None
    params = own_part({name: tensor.detach() for name, tensor in module.state_dict().items()}, spread=spread)
    moments: dict[str, dict[str, Tensor]] = {}
    num_updates = 0
    for name, parameter in module.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if kind == "step":
                num_updates = int(value)
            elif name in params and value is not None:  # SGD has no momentum before its first update
                moments.setdefault(kind, {})[name] = value.detach()
    return PortableState(params, moments, num_updates)


def load_replicated(module: nn.Module, optimizer: torch.optim.Optimizer, state: PortableState) -> None:
    """Take over a portable state where every rank holds all of it."""
    module.load_state_dict(state.params)
    optimizer.state.clear()
    for name, parameter in module.named_parameters():
        kept = {kind: of[name].to(parameter.device, copy=True) for kind, of in state.moments.items() if name in of}
        if kept and isinstance(optimizer, torch.optim.AdamW):
            kept["step"] = step_tensor(state.num_updates, parameter.device)
        if kept:
            optimizer.state[parameter] = kept


def step_tensor(num_updates: int, device: torch.device) -> Tensor:
    """A step counter as fused AdamW keeps it."""
    return torch.tensor(float(num_updates), device=device)
