"""Training by CUDA graphs, and copies on a stream of their own, held to the same steps without them."""

from collections.abc import Callable

import pytest
import torch
from scenario import ACCUM, GRID, MOMENTUM, build_model, build_optimizer, micro_batch

from personmae.data.stream import CanvasBatch, to_device
from personmae.engine.native import NativeEngine
from personmae.model.personmae import View, compile_parts, prepare_batch
from personmae.model.teacher import Teacher

VIEW = View((128, 64), 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32, (0.8, 1.0), (0.375, 0.667), 0.5, "block", 0.75, 4)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def train(device: str, *, is_graphed: bool, prepare_model: Callable[..., object] = lambda *_: None) -> list[float]:
    """Losses of six steps of two micro-batches, read when all are done."""
    model = build_model().to(device)
    teacher = Teacher(model.encoder, GRID).to(device)
    prepare_model(model, teacher)
    engine = NativeEngine(model, build_optimizer(model), grad_accum_steps=ACCUM, max_norm=None, is_graphed=is_graphed)
    losses = []
    for step in range(6):
        for micro in range(ACCUM):
            batch = {name: tensor.to(device) for name, tensor in micro_batch(step, micro).items()}
            torch.compiler.cudagraph_mark_step_begin()
            batch["target"] = teacher(batch["patches_b"])
            losses.append(engine.forward_backward(batch, last_micro=micro == ACCUM - 1)["loss"])
        skipped = engine.step(1.0).skipped
        with engine.full_params(model.encoder) as params:
            teacher.update(params, MOMENTUM, skipped)
    return torch.stack(losses).tolist()


def test_gradients_that_stay_where_they_are_give_the_same_steps() -> None:
    assert train("cpu", is_graphed=True) == train("cpu", is_graphed=False)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_graphs_give_the_losses_of_the_plain_loop(device: str) -> None:
    plain = train(device, is_graphed=False)
    graphed = train(device, is_graphed=True, prepare_model=lambda *parts: compile_parts(*parts, cuda_graphs=True))
    torch.testing.assert_close(graphed, plain, rtol=2e-4, atol=0)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_batches_that_are_copied_aside_arrive_whole(device: str) -> None:
    height, width = VIEW.canvas_size
    copies = torch.cuda.Stream()
    for number in range(20):
        host = CanvasBatch(
            torch.full((64, height, width, 3), number, dtype=torch.uint8).pin_memory(),
            torch.full((64, 2), 128).pin_memory(),
            torch.full((64, 2), 128).pin_memory(),
            torch.arange(64).pin_memory(),
        )
        moved = to_device(host, torch.device(device), copies)
        torch.cuda._sleep(1_000_000)  # the device is busy while the next copy is under way
        for ours, theirs in zip(prepare_batch(*moved, VIEW).values(), prepare_batch(*host, VIEW).values(), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-4)
