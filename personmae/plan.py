"""What a pre-training run comes to, told before a GPU is waited for: batch, memory, and the world sizes that would do."""

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from personmae import dist
from personmae.model.personmae import PersonMAE, View, cut_batch, draw_batch
from personmae.model.teacher import Teacher

_PROBE_IMAGES = 2
_MOST_RANKS = 1024
_FP32 = 4  # bytes


def admissible_world_sizes(global_batch_size: int, most: int = _MOST_RANKS) -> list[int]:
    """The numbers of ranks that can take equal parts of a global batch."""
    return [n for n in range(1, min(global_batch_size, most) + 1) if global_batch_size % n == 0]


def saved_bytes_per_image(model: PersonMAE, view: View) -> int:
    """Bytes that the forward pass keeps for the backward pass, per image, without what belongs to the parameters.

    Counted on the CPU with a few images. It bounds what a GPU needs: its attention keeps no probabilities, and a compiled
    model computes some things again.
    """
    height, width = view.canvas_size
    size = torch.tensor([[height, width]] * _PROBE_IMAGES)
    canvas = torch.zeros(_PROBE_IMAGES, height, width, 3, dtype=torch.uint8)
    batch = cut_batch(canvas, size, draw_batch(torch.arange(_PROBE_IMAGES), size, view), view)
    if model.feature_decoder is not None:
        batch["target"] = Teacher(model.encoder, view.grid, model.compute_dtype)(batch["patches_b"])
    seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch)  # alive until all is counted, or addresses would come twice
    del losses
    return total // _PROBE_IMAGES


def show_plan(
    model: PersonMAE, view: View, *, global_batch_size: int, max_micro_batch_size: int, world_size: int, facts: dict[str, str]
) -> None:
    """Print the plan of a run for ``world_size`` ranks, below what is known of it already (``facts``).

    Raises:
        UserError: these ranks cannot take equal parts of the batch.
    """
    plan = dist.plan_batch(global_batch_size, world_size, max_micro_batch_size)
    num_params, num_encoder = (sum(p.numel() for p in m.parameters()) for m in (model, model.encoder))
    num_teacher = num_encoder if model.feature_decoder is not None else 0
    states = _FP32 * (4 * num_params + num_teacher)
    activations = saved_bytes_per_image(model, view) * plan.micro_batch_size
    memory = {
        "memory of a rank": f"{_gib(states + activations)}, and what the libraries take:",
        "  states": f"{_gib(states)} parameters, gradients, two moments and the teacher, unsharded",
        "  activations": f"{_gib(activations)} at most, kept for the backward pass",
    }
    table = Table(show_header=False)
    for name, value in ({"model": _count(num_params, num_encoder)} | facts | {"batch": str(plan)} | memory).items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    worlds = Table("ranks", "micro-batches", "of images", title="world sizes that can take this batch")
    for size in admissible_world_sizes(global_batch_size):
        each = dist.plan_batch(global_batch_size, size, max_micro_batch_size)
        worlds.add_row(str(size), str(each.grad_accum_steps), str(each.micro_batch_size))
    console.print(worlds)


def _count(num_params: int, num_encoder: int) -> str:
    return f"{num_encoder / 1e6:.1f} M parameters in the encoder, {num_params / 1e6:.1f} M with decoders"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
