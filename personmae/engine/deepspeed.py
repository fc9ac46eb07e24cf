"""The DeepSpeed engine, ZeRO stages 0 to 3. Everything that leans on DeepSpeed's own names and defaults is in this file.

Its dict is generated here from plain arguments, so there is one source for every number. Parameters, moments and gradients
stay fp32 on DeepSpeed's side. The module enters bf16 autocast itself. Clipping and the guard against NaN are ours at every
stage (``base.guarded_update``), so that one norm counts and, below stage 3, no step waits for the device.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as tdist
from torch import Tensor, nn

from personmae import dist
from personmae.engine.base import (
    MOMENTS,
    Batch,
    Engine,
    PortableState,
    Update,
    full_shapes,
    guarded_loss,
    guarded_update,
    load_replicated,
    owners,
    rank,
    replicated_state,
    require_fit,
    require_whole,
    step_tensor,
    total_norm,
)
from personmae.errors import UserError

# What the rest of the configuration decides, or what could not be read back into a portable state.
_OURS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("managed_gradient_accumulation", "optimizer", "scheduler", "bf16", "fp16", "amp", "torch_autocast", "data_types"),
    *("elasticity", "tensor_parallel", "sequence_parallel_size"),
)
_OURS_OF_ZERO = (
    *("stage", "compute_grad_norm", "memory_efficient_linear", "offload_optimizer", "offload_param", "zenflow"),
    *("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients", "mics_shard_size"),
)
# DeepSpeed's private names that are read or written here, by stage.
_PRIVATE = {
    1: ("single_partition_of_fp32_groups", "round_robin_bit16_groups", "round_robin_bit16_offsets", "averaged_gradients"),
    3: ("fp32_partitioned_groups_flat", "averaged_gradients"),
}
_PRIVATE[2] = _PRIVATE[1]


def deepspeed_config(
    *, micro_batch_size: int, grad_accum_steps: int, zero_stage: int, num_parameters: int, extra: dict[str, Any]
) -> dict[str, Any]:
    """The DeepSpeed dict. ``extra`` is merged last, section by section.

    What DeepSpeed defaults to is not always harmless: clipping would be at 1.0, and a bucket would take 2 GB.

    Raises:
        UserError: ``extra`` sets what follows from the configuration, or is not made of sections.
    """
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage:
        zero["reduce_bucket_size"] = zero["allgather_bucket_size"] = max(10_000_000, num_parameters // 4)
    if zero_stage in (1, 2):  # overlap_comm would wait for the device after every backward pass
        zero |= {"overlap_comm": False, "compute_grad_norm": False}
    if zero_stage == 3:  # else F.linear is replaced by one that adds its bias to what selective checkpointing has kept
        zero["memory_efficient_linear"] = False
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if not isinstance(extra.get("zero_optimization", {}), dict):
        raise UserError(f"engine.deepspeed.extra needs settings in zero_optimization, got {extra['zero_optimization']!r}")
    taken = [key for key in extra if key in _OURS]
    taken += [f"zero_optimization.{key}" for key in _OURS_OF_ZERO if key in extra.get("zero_optimization", {})]
    if taken:
        raise UserError(f"engine.deepspeed.extra must not set '{taken[0]}', which follows from the configuration. Leave it out")
    for key, value in extra.items():
        merges = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = config[key] | value if merges else value
    return config


class DeepSpeedEngine(Engine):
    """A module under ``deepspeed.initialize``. The process group must exist."""

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
        if zero_stage == 3 and any(part._compiled_call_impl for part in module.modules()):
            raise UserError("ZeRO stage 3 gathers parameters in hooks that torch.compile cannot trace. Set train.compile=false")
        if zero_stage and (frozen := [name for name, p in module.named_parameters() if not p.requires_grad]):
            raise UserError(f"ZeRO keeps trained parameters only, {frozen[0]} is frozen. Use engine.name=native")
        self._shapes, self._max_norm, self._stage = full_shapes(module), max_norm, zero_stage
        config = deepspeed_config(
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            zero_stage=zero_stage,
            num_parameters=sum(parameter.numel() for parameter in module.parameters()),
            extra=extra,
        )
        os.environ.setdefault("LOCAL_RANK", "0")  # asserted even where the process group exists
        self._deepspeed = _import_deepspeed()
        self._deepspeed.init_distributed(auto_mpi_discovery=False)
        try:
            self._engine, *_ = self._deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        except self._deepspeed.DeepSpeedConfigError as error:
            raise UserError(f"DeepSpeed does not accept engine.deepspeed.extra={extra}: {error}") from None
        self.module, self.optimizer, self._zero = module, optimizer, self._engine.optimizer
        self.is_sharded, self._closed = zero_stage > 0, False
        require_private_names(self._zero, zero_stage, self._deepspeed.__version__)
        require_whole(self, self._shapes)

    def forward_backward(self, batch: Batch, *, last_micro: bool) -> Batch:
        losses = self._engine(batch)
        self._engine.backward(guarded_loss(losses["loss"]))
        if not last_micro:
            self._engine.step()  # counts the micro-batch. Nothing is updated before the last one
        return {name: loss.detach() for name, loss in losses.items()}

    def step(self, lr_scale: float) -> Update:
        done = guarded_update(self.optimizer, lr_scale, self._grad_norm(), self._max_norm)
        self._engine.step()
        return done

    @contextlib.contextmanager
    def full_params(self, module: nn.Module) -> Iterator[list[Tensor]]:
        parameters: list[Tensor] = list(module.parameters())
        with self._deepspeed.zero.GatheredParameters(parameters, enabled=self._stage == 3):
            yield parameters

    def portable_state(self, *, spread: bool = False) -> PortableState | None:
        if self._stage == 0:
            return replicated_state(self.module, self.optimizer, spread=spread)
        given = owners(self._shapes, spread=spread)
        states = [state for flat in self._flats() if (state := self.optimizer.state.get(flat))]
        params, *moments = [self._gathered(kind, given) if states or kind is None else {} for kind in (None, *MOMENTS)]
        if not (spread or dist.is_first()):
            return None
        for name, buffer in self.module.named_buffers():
            if given.get(name) == rank():
                params[name] = buffer.detach().to("cpu", copy=True)
        return PortableState(params, dict(zip(MOMENTS, moments, strict=True)), int(states[0]["step"]) if states else 0)

    @torch.no_grad()
    def load_portable(self, state: PortableState) -> None:
        require_fit(self._shapes, state)
        if self._stage == 0:
            load_replicated(self.module, self.optimizer, state)
            return
        for name, buffer in self.module.named_buffers():
            if name in state.params:
                buffer.copy_(state.params[name])
        parameters = dict(self.module.named_parameters())
        for name, parameter in parameters.items():
            with self._gathered_for_writing(parameter) if self._stage == 3 else contextlib.nullcontext():
                parameter.copy_(state.params[name])
        self._scatter(None, state.params)
        self.optimizer.state.clear()
        if any(state.moments.values()):
            for flat in self._flats():
                zeros = {kind: torch.zeros_like(flat) for kind in MOMENTS}
                self.optimizer.state[flat] = {"step": step_tensor(state.num_updates, flat.device)} | zeros
            for kind in MOMENTS:
                self._scatter(kind, state.moments[kind])

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._engine.destroy()

    def _grad_norm(self) -> Tensor:
        if self._stage == 0:
            return total_norm(p.grad for p in self.module.parameters() if p.grad is not None)
        parts = self._zero.averaged_gradients.values()
        local = total_norm(part.float() for group in parts for part in group)
        squared = local.square()
        tdist.all_reduce(squared)
        return squared.sqrt()

    def _flats(self) -> list[Tensor]:
        """This rank's fp32 parameters as the optimizer holds them: one flat tensor for each group."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _placed(self) -> Iterator[tuple[Tensor, list[tuple[str, nn.Parameter, int]]]]:
        """Stages 1 and 2: each flat tensor, of which the ranks hold equal parts, with the offsets of its parameters."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        groups = zip(self._flats(), self._zero.round_robin_bit16_groups, self._zero.round_robin_bit16_offsets, strict=True)
        for flat, group, offsets in groups:
            yield flat, [(names[parameter], parameter, offset) for parameter, offset in zip(group, offsets, strict=True)]

    def _local(self, flat: Tensor, kind: str | None) -> Tensor:
        return flat.detach() if kind is None else self.optimizer.state[flat][kind]

    def _gathered(self, kind: str | None, owners: dict[str, int]) -> dict[str, Tensor]:
        """fp32 parameters, or moments of a ``kind``, on their owners' CPUs. A GPU holds one of them at a time."""
        kept: dict[str, Tensor] = {}
        if self._stage == 3:
            utils = self._deepspeed.utils
            for name, parameter in self.module.named_parameters():
                read = utils.safe_get_full_fp32_param if kind is None else utils.safe_get_full_optimizer_state
                whole = read(parameter) if kind is None else read(parameter, kind)
                if owners[name] == rank():
                    kept[name] = whole.detach().to("cpu", copy=True)
            return kept
        for flat, placed in self._placed():
            for name, parameter, offset in placed:
                whole = _joined(self._local(flat, kind), offset, offset + parameter.numel(), owners[name])
                if whole is not None:
                    kept[name] = whole.view(parameter.shape).to("cpu", copy=True)
        return kept

    def _scatter(self, kind: str | None, values: dict[str, Tensor]) -> None:
        """Put this rank's part of whole tensors where the optimizer keeps it. What is missing is zero there already."""
        if self._stage == 3:
            utils = self._deepspeed.utils
            for name, parameter in self.module.named_parameters():
                if name not in values:
                    continue
                length = parameter.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
                part = torch.zeros(length, device=parameter.device)
                own = values[name].flatten()[rank() * length : (rank() + 1) * length]  # shorter at the end
                part[: own.numel()] = own
                if kind is None:
                    utils.safe_set_local_fp32_param(parameter, part)
                else:
                    utils.safe_set_local_optimizer_state(parameter, part, kind)
            return
        for flat, placed in self._placed():
            local = self._local(flat, kind)
            for name, parameter, offset in placed:
                start, end = _overlap(local, offset, offset + parameter.numel(), rank())
                if name in values and start < end:
                    first = rank() * local.numel()
                    local[start - first : end - first] = values[name].flatten()[start - offset : end - offset].to(local.device)

    def _gathered_for_writing(self, parameter: nn.Parameter) -> Any:
        """A parameter sharded by stage 3, whole. What the first rank writes into it is kept."""
        return self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _overlap(local: Tensor, start: int, end: int, rank: int) -> tuple[int, int]:
    """What a rank holds of the elements from ``start`` to ``end`` of a flat tensor, of which all hold parts like ``local``."""
    return max(start, rank * local.numel()), min(end, (rank + 1) * local.numel())


def _joined(local: Tensor, start: int, end: int, owner: int) -> Tensor | None:
    """These elements of a flat tensor on the rank ``owner``, sent by those that hold them. None on all others."""
    length = local.numel()
    whole = local.new_empty(end - start) if rank() == owner else None
    for holder in range(start // length, (end - 1) // length + 1):
        first, last = _overlap(local, start, end, holder)
        part = local[first - holder * length : last - holder * length] if rank() == holder else None
        if part is not None and whole is not None:
            whole[first - start : last - start] = part
        elif part is not None:
            tdist.send(part, dst=owner)
        elif whole is not None:
            tdist.recv(whole[first - start : last - start], src=holder)
    return whole


def require_private_names(zero: Any, zero_stage: int, version: str) -> None:
    """Raise a UserError if DeepSpeed no longer has what this file reads."""
    missing = [name for name in _PRIVATE.get(zero_stage, ()) if not hasattr(zero, name)]
    if missing:
        raise UserError(
            f"engine/deepspeed.py leans on DeepSpeed's {', '.join(missing)} at ZeRO stage {zero_stage}, which version "
            f"{version} does not have: install the version that pyproject.toml asks for, or mend that file and run tests/engine"
        )


def _import_deepspeed() -> Any:
    if not dist.use_cuda():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # it calls them in every step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops

        # On CPUs init_distributed would compile this op for half a minute and leave files in /dev/shm. Gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
