"""Training by CUDA graphs, and copies on a stream of their own, held to the same steps without them."""

from collections.abc import Callable

import pytest
import torch
from scenario import ACCUM, GRID, MOMENTUM, build_model, build_optimizer, micro_batch

from personmae.data.stream import CanvasBatch, to_device
from personmae.engine.native import NativeEngine
from personmae.model.compiled import compile_parts
from personmae.model.inputs import RegionSpec, prepare_batch
from personmae.model.teacher import Teacher

SPEC = RegionSpec((128, 64), 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32, (0.8, 1.0), (0.375, 0.667), 0.5, "block", 0.75, 4)
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
            if is_graphed:
                torch.compiler.cudagraph_mark_step_begin()
            batch["target"] = teacher(batch["patches_b"])
            losses.append(engine.forward_backward(batch, last_micro=micro == ACCUM - 1)["loss"])
        skipped = engine.step(1.0).skipped
        with engine.full_params(model.encoder) as params:
            teacher.update(params, MOMENTUM, skipped)
    return torch.stack(losses).tolist()


def test_gradients_that_stay_where_they_are_give_the_same_steps() -> None:
    assert train("cpu", is_graphed=True) == train("cpu", is_graphed=False)


@pytest.mark.filterwarnings("ignore:TensorFloat32")  # the compiler's advice
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_graphs_give_the_losses_of_the_plain_loop(device: str) -> None:
    plain = train(device, is_graphed=False)
    graphed = train(device, is_graphed=True, prepare_model=lambda *parts: compile_parts(*parts, cuda_graphs=True))
    torch.testing.assert_close(graphed, plain, rtol=2e-4, atol=0)


def host_batch(seed: int) -> CanvasBatch:
    """64 different images of 100 x 100 pixels, in pinned memory as a ``BatchReader`` has them."""
    generator = torch.Generator().manual_seed(seed)
    canvas = torch.randint(0, 256, (64, *SPEC.canvas_size, 3), dtype=torch.uint8, generator=generator)
    size = torch.full((64, 2), 100)
    return CanvasBatch(*(tensor.pin_memory() for tensor in (canvas, size, size.clone(), 64 * seed + torch.arange(64))))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_batches_are_not_used_before_they_have_arrived(device: str) -> None:
    copies = torch.cuda.Stream()
    for seed in range(4):
        host = host_batch(seed)
        expected = prepare_batch(*CanvasBatch(*(tensor.to(device) for tensor in host)), SPEC)
        torch.cuda.synchronize()
        with torch.cuda.stream(copies):
            torch.cuda._sleep(50_000_000)  # some 30 ms, before which no copy begins
        found = prepare_batch(*to_device(host, torch.device(device), copies), SPEC)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_memory_of_a_batch_is_not_given_away_while_it_is_still_to_be_used(device: str) -> None:
    copies, host = torch.cuda.Stream(), host_batch(0)
    for _ in range(4):
        canvas = to_device(host, torch.device(device), copies).canvas
        torch.cuda._sleep(50_000_000)  # the device is busy with the batch before
        used = canvas.clone()
        del canvas
        with torch.cuda.stream(copies):
            _next = torch.zeros_like(host.canvas, device=device)  # would stand where the canvas stood
        assert torch.equal(used.cpu(), host.canvas)
