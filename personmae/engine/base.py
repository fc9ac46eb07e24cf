"""The contract between a program and whatever trains its module; it knows no model.

Schedules, the teacher, the data cursor, checkpoint files and metrics live outside, once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from personmae import dist

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class PortableState:
    """What a run needs besides its data cursor, by parameter name and without regard to ranks."""

    params: dict[str, Tensor]  # fp32 parameters, and the buffers of the state dict
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    num_updates: int


class Engine(ABC):
    """Trains ``module``, whose ``forward(batch)`` returns a dict with a scalar "loss" that is a mean over the batch."""

    module: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def forward_backward(self, batch: Batch, *, last_micro: bool) -> Batch:
        """Losses of one micro-batch, detached and on the device; gradients accumulate as means over the global batch."""

    @abstractmethod
    def step(self, lr_scale: float) -> Tensor:
        """Update the parameters with ``lr_scale`` times each group's peak rate; returns the gradient norm."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what the engine holds beyond memory."""

    def any(self, flag: bool) -> bool:
        """True on all ranks when it is True on one."""
        return dist.any_rank(flag)

    def portable_state(self) -> PortableState:
        """Copies on the CPU, by parameter name."""
        moments: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
        num_updates = 0
        for name, parameter in self.module.named_parameters():
            if state := self.optimizer.state.get(parameter):
                num_updates = int(state["step"])
                for kind, kept in moments.items():
                    kept[name] = state[kind].detach().float().cpu().clone()
        params = {name: t.detach().cpu().clone() for name, t in self.module.state_dict().items()}
        return PortableState(params, **moments, num_updates=num_updates)

    def load_portable(self, state: PortableState) -> None:
        """Take over parameters and moments, whichever engine and world size wrote them."""
        self.module.load_state_dict(state.params)
        for name, parameter in self.module.named_parameters():
            if name in state.exp_avg:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.num_updates), device=parameter.device),
                    "exp_avg": state.exp_avg[name].to(parameter.device, copy=True),
                    "exp_avg_sq": state.exp_avg_sq[name].to(parameter.device, copy=True),
                }


def set_lr(optimizer: torch.optim.Optimizer, lr_scale: float) -> None:
    """Scale every group's peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_scale
