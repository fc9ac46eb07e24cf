"""``personmae pretrain CONFIG --dry-run RANKS``: the data is opened and the plan of the run printed. Nothing is trained."""

import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from personmae import batch_plan, config, dist, precision
from personmae.data.shard_set import ShardSet
from personmae.inspect import hiding
from personmae.model.inputs import RegionSpec, cut_batch, draw_batch
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher
from personmae.pretrain_state import build_model, count_steps
from personmae.synthetic.benchmarks import read_mark

_PROBE_IMAGES = (2, 4)
_FP32 = 4  # bytes


def show(settings: config.Pretrain, world_size: int) -> None:
    """Print what the run would come to on ``world_size`` ranks, and what its masks hide. Nothing is written.

    Raises:
        UserError: the data cannot be read, or the ranks cannot share the batch.
    """
    with tempfile.TemporaryDirectory() as cache, ShardSet(settings.data.shards, cache) as shards:
        num_samples, total_steps = len(shards), count_steps(settings, len(shards))
    images = total_steps * settings.train.global_batch_size
    chosen = precision.choose(settings.train.precision, str(dist.read_world().device))
    other = "" if chosen.by_hand else ". Elsewhere auto may choose the other: give train.precision to plan for that machine"
    facts = {
        "size": f"{settings.model.size} at {settings.model.img_size[0]}x{settings.model.img_size[1]}",
        "data": f"{num_samples:,} samples at {settings.data.shards}",
        "run": f"{total_steps:,} steps, {images:,} images, {images / num_samples:.1f} epochs, in {settings.run_dir}",
        "engine": settings.engine.name,
        "precision": str(chosen).removeprefix("precision ") + other,
    }
    spec = RegionSpec(**settings.region_arguments())
    show_plan(
        build_model(settings, chosen),
        spec,
        global_batch_size=settings.train.global_batch_size,
        max_micro_batch_size=settings.train.max_micro_batch_size,
        world_size=world_size,
        facts=facts,
        teacher_arguments=settings.teacher_arguments(),
    )
    hiding.print_hiding(spec, settings.seed, read_mark(settings.data.shards))


class Kept(NamedTuple):
    """Bytes that the forward pass keeps for the backward pass."""

    fixed: int  # whatever the batch: copies of parameters in the compute type
    per_image: int


def count_kept(model: PersonMAE, spec: RegionSpec, teacher_arguments: Mapping[str, Any] = MappingProxyType({})) -> Kept:
    """What the forward pass keeps, inputs included and parameters not, with the model's activation checkpointing.

    Counted on the CPU with a few images, as what is still there once it is done. It bounds what a GPU needs: its attention
    keeps no probabilities, and a compiled model computes some things again.
    """
    teacher = Teacher(model.encoder, spec.grid, model.compute_dtype, **teacher_arguments) if model.needs_teacher else None
    few, more = (_count_kept(model, teacher, spec, num_images) for num_images in _PROBE_IMAGES)
    per_image = (more - few) // (_PROBE_IMAGES[1] - _PROBE_IMAGES[0])
    return Kept(max(0, few - per_image * _PROBE_IMAGES[0]), per_image)


def _count_kept(model: PersonMAE, teacher: Teacher | None, spec: RegionSpec, num_images: int) -> int:
    height, width = spec.canvas_size
    size = torch.tensor([[height, width]] * num_images)
    canvas = torch.zeros(num_images, height, width, 3, dtype=torch.uint8)
    draws = draw_batch(torch.arange(num_images), size, spec)
    with _Allocations() as allocations:
        batch = cut_batch(canvas, size, draws, spec)
        if teacher is not None:
            batch["target"] = teacher(batch["patches_b"])
        losses = model(batch)
        kept = allocations.alive_bytes()
    del losses  # until here it kept all that is counted
    return kept


class _Allocations(TorchDispatchMode):
    """Knows the memory that is taken while it is entered, by tensors that are computed, without keeping any alive.

    Hooks on saved tensors would not do: selective checkpointing keeps what it has chosen in a place of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = _storages((args, kwargs)).keys() - self._bytes.keys()  # parameters: a view of one takes nothing
        self._bytes |= {storage: size for storage, size in _storages(result).items() if storage not in before}
        return result

    def alive_bytes(self) -> int:
        """Bytes that are still in use."""
        return sum(size for storage, size in self._bytes.items() if not storage.expired())


def _storages(tree: Any) -> dict[StorageWeakRef, int]:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}


def show_plan(
    model: PersonMAE,
    spec: RegionSpec,
    *,
    global_batch_size: int,
    max_micro_batch_size: int,
    world_size: int,
    facts: dict[str, str],
    teacher_arguments: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Print the plan of a run for ``world_size`` ranks, below what is known of it already (``facts``).

    Raises:
        UserError: these ranks cannot take equal parts of the batch.
    """
    plan = batch_plan.plan_batch(global_batch_size, world_size, max_micro_batch_size)
    num_params, num_encoder = (sum(p.numel() for p in m.parameters()) for m in (model, model.encoder))
    num_teacher = num_encoder if model.needs_teacher else 0
    states = _FP32 * (4 * num_params + num_teacher)
    kept = count_kept(model, spec, teacher_arguments)
    activations = kept.fixed + kept.per_image * plan.micro_batch_size
    memory = {
        "memory of a rank": f"{_gib(states + activations)}, and what the libraries take:",
        "  states": f"{_gib(states)} parameters, gradients, two moments and the teacher, unsharded",
        "  activations": f"{_gib(activations)} at most, kept for the backward pass",
    }
    table = Table(show_header=False)
    for name, value in ({"model": _count(num_params, num_encoder)} | facts | {"batch": str(plan)} | memory).items():
        table.add_row(name, escape(value))
    console = Console()
    console.print(table)
    worlds = Table("ranks", "micro-batches", "of images", title="world sizes that can take this batch")
    for size in batch_plan.admissible_world_sizes(global_batch_size):
        each = batch_plan.plan_batch(global_batch_size, size, max_micro_batch_size)
        worlds.add_row(str(size), str(each.grad_accum_steps), str(each.micro_batch_size))
    console.print(worlds)


def _count(num_params: int, num_encoder: int) -> str:
    return f"{num_encoder / 1e6:.1f} M parameters in the encoder, {num_params / 1e6:.1f} M with decoders"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
