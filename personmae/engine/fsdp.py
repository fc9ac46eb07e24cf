"""The FSDP2 engine: parameters, gradients and moments are sharded over ranks, for models that do not fit one GPU.

``fully_shard`` works in place: the module's parameters become DTensors. With ``shard_size`` ranks are cut into groups of that
many which shard among themselves and replicate between each other (HSDP), so that a host can be a group.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.distributed as tdist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

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
    owners,
    rank,
    require_fit,
    require_whole,
    step_tensor,
    total_norm,
)
from personmae.errors import UserError

_BLOCKS_PER_GROUP = 4  # hooks cost the host more than the memory of three more blocks is worth (docs/decisions.md)


class FsdpEngine(Engine):
    """A module under ``fully_shard``. The process group must exist, and the optimizer must not have a state yet.

    Gradients are reduced to shards after every micro-batch: kept whole until the last one, they would fill what sharding saves.
    """

    is_sharded = True

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        grad_accum_steps: int,
        max_norm: float | None,
        shard_size: int | None = None,
    ):
        self._grad_accum_steps, self._max_norm = grad_accum_steps, max_norm
        self._shapes = full_shapes(module)
        names = {parameter: name for name, parameter in module.named_parameters()}
        for tensor in module.state_dict().values():
            tdist.broadcast(tensor, src=0)  # as the other engines do, for fully_shard takes each rank's own values
        _shard(module, _build_mesh(shard_size))
        sharded = dict(module.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
        self.module, self.optimizer = module, optimizer
        require_whole(self, self._shapes)

    def forward_backward(self, batch: Batch, *, last_micro: bool) -> Batch:
        losses = self.module(batch)
        (guarded_loss(losses["loss"]) / self._grad_accum_steps).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def step(self, lr_scale: float) -> Update:
        norm = _whole(total_norm(p.grad for p in self.module.parameters() if p.grad is not None))
        done = guarded_update(self.optimizer, lr_scale, norm, self._max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return done

    @contextlib.contextmanager
    def full_params(self, module: nn.Module) -> Iterator[list[Tensor]]:
        yield _whole_list([parameter.detach() for parameter in module.parameters()])

    def portable_state(self, *, spread: bool = False) -> PortableState | None:
        given = owners(self._shapes, spread=spread)
        params = _gathered(self.module.state_dict(), given)
        states = {name: self.optimizer.state.get(parameter) for name, parameter in self.module.named_parameters()}
        moments = {kind: _gathered({name: state[kind] for name, state in states.items() if state}, given) for kind in MOMENTS}
        num_updates = next((int(state["step"]) for state in states.values() if state), 0)
        return PortableState(params, moments, num_updates) if spread or dist.is_first() else None

    @torch.no_grad()
    def load_portable(self, state: PortableState) -> None:
        require_fit(self._shapes, state)
        self.optimizer.state.clear()
        for name, tensor in self.module.state_dict().items():
            tensor.copy_(_like(state.params[name], tensor))
        for name, parameter in self.module.named_parameters():
            if name in state.moments.get(MOMENTS[0], {}):
                self.optimizer.state[parameter] = {
                    "step": step_tensor(state.num_updates, parameter.device),
                    **{kind: _like(state.moments[kind][name], parameter) for kind in MOMENTS},
                }

    def close(self) -> None:
        """Nothing is held."""


def _gathered(tensors: dict[str, Tensor], owners: dict[str, int]) -> dict[str, Tensor]:
    """Whole tensors on their owners' CPUs, one after the other so that a GPU holds one at a time."""
    kept = {}
    for name, tensor in tensors.items():
        whole = _whole(tensor.detach())
        if owners[name] == rank():
            kept[name] = whole.to("cpu", copy=True)
    return kept


def _build_mesh(shard_size: int | None) -> DeviceMesh:
    world_size, device = tdist.get_world_size(), "cuda" if dist.use_cuda() else "cpu"
    if shard_size is None or shard_size == world_size:
        return init_device_mesh(device, (world_size,))
    if world_size % shard_size:
        sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise UserError(
            f"engine.fsdp.shard_size={shard_size} must divide the world size {world_size}. "
            f"Use one of {', '.join(map(str, sizes))}"
        )
    return init_device_mesh(device, (world_size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a module: a few blocks of each list together, all that is left with the root."""
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for part in list(module.modules()):
        if isinstance(part, nn.ModuleList):
            for first in range(0, len(part), _BLOCKS_PER_GROUP):
                fully_shard(list(part)[first : first + _BLOCKS_PER_GROUP], mesh=mesh, mp_policy=precision)
    fully_shard(module, mesh=mesh, mp_policy=precision)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _whole_list(tensors: list[Tensor]) -> list[Tensor]:
    """The same as ``_whole`` of each, in one collective."""
    sharded = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    if not sharded:
        return tensors
    mesh = sharded[0].device_mesh
    group = mesh.get_group(mesh.ndim - 1)  # the last dimension is the one that shards
    num_parts = group.size()
    lengths = [math.ceil(t.shape[0] / num_parts) * math.prod(t.shape[1:]) for t in sharded]  # the first dimension is cut
    parts = [F.pad(t.to_local().flatten(), (0, n - t.to_local().numel())) for t, n in zip(sharded, lengths, strict=True)]
    local = torch.cat(parts)
    gathered = local.new_empty(num_parts * local.numel())
    tdist.all_gather(list(gathered.chunk(num_parts)), local, group=group)
    pieces = zip(sharded, gathered.view(num_parts, -1).split(lengths, dim=1), strict=True)
    whole = iter([piece.flatten()[: tensor.numel()].view(tensor.shape) for tensor, piece in pieces])
    return [next(whole) if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _like(value: Tensor, sharded: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole."""
    value = value.to(sharded.device, copy=True)
    if not isinstance(sharded, DTensor):
        return value
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
