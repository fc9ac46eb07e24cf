"""The GPU kernel held to its slow twin, ``inputs.cut_batch``: by Triton's interpreter, and on a GPU where there is one."""

import dataclasses
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import SPEC
from torch import Tensor

from personmae.model.compiled import choose_prepare
from personmae.model.inputs import Batch, Draws, RegionSpec, cut_batch, draw_batch
from personmae.model.personmae import PersonMAE, pixel_target
from personmae.model.regions import RegionDraws

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with the CUDA builds of torch alone"),
]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]),
]
SMALL = dataclasses.replace(SPEC, img_size=(48, 32), max_shift=16)
GREY = dataclasses.replace(SMALL, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
# Pixels are normalised by a deviation of at least a quarter of their range. Bytes are exact in fp16, weights and half-done
# sums are kept to 2^-22; what is left is the order of some forty sums in fp32, twice.
PIXEL_TOLERANCE = 2e-5

Case = tuple[Tensor, Tensor, Draws, RegionSpec, dict[str, Any]]

# A process of its own: the interpreter has to be chosen before Triton is imported.
KERNEL = """
import pickle, sys
import torch
from personmae.model import kernel
from personmae.model.inputs import Draws
from personmae.model.regions import RegionDraws
cases, device = pickle.load(open(sys.argv[1], "rb")), sys.argv[2]
torch.set_num_threads(1)
done = []
for canvas, size, draws, spec, options in cases:
    draws = Draws(RegionDraws(*(field.to(device) for field in draws.regions)), draws.ids_keep.to(device))
    batch = kernel.cut_batch(canvas.to(device), size.to(device), draws, spec, **options)
    done.append({name: tensor.cpu() for name, tensor in batch.items()})
pickle.dump(done, open(sys.argv[1], "wb"))
"""

# With the shape checks, as in all other tests: on a GPU they may run the kernel too.
COMPILE = """
import sys
from jaxtyping import install_import_hook
install_import_hook("personmae.model", "beartype.beartype")
import triton
from triton.backends.compiler import GPUTarget
from personmae.model import kernel
pointers = dict(canvas="*u8", flip="*i1", boxes="*fp32", patches_a="*bf16", patches_b="*bf16")
pointers |= dict.fromkeys(["size", "scale", "shift", "ids_keep"], "*i64")
pointers |= dict.fromkeys(["coords_a", "coords_b", "pixel_target"], "*fp32")
numbers = dict.fromkeys(["canvas_h", "canvas_w", "num_visible", "num_patches"], "i32")
numbers |= {f"{kind}_{colour}": "fp32" for kind in ("mean", "std") for colour in "rgb"}
known = dict(img_h=256, img_w=128, patch_size=16, tile=16, num_rows=kernel.ROWS, num_columns=kernel.COLUMNS)
signature = pointers | numbers | dict.fromkeys(known, "constexpr")
source = triton.compiler.ASTSource(kernel._cut_patch, signature=signature, constexprs=known)
options = {"num_warps": kernel.NUM_WARPS, "enable_fp_fusion": False}
compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
assert "mma.sync" in compiled.asm["ptx"]
assert "fma.rn.f32" in compiled.asm["ptx"]
assert len(compiled.asm["cubin"]) > 0
"""


def python(program: str, *arguments: str, **environment: str) -> None:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def run(device: str, *cases: Case) -> list[Batch]:
    """The kernel's answers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cases.pickle")
        path.write_bytes(pickle.dumps(cases))
        python(KERNEL, str(path), device, TRITON_INTERPRET=str(int(device == "cpu")))
        return pickle.loads(path.read_bytes())


def a_case(boxes: list[list[float]], sizes: list[list[int]], spec: RegionSpec = SMALL, **options: Any) -> Case:
    """Noise on a canvas of odd size, every second sample flipped, with the largest and the smallest p and shifts."""
    count, generator = len(boxes), torch.Generator().manual_seed(0)
    canvas = torch.randint(0, 256, (count, 91, 61, 3), dtype=torch.uint8, generator=generator)
    scale = torch.tensor([16, 0, 7, 16, 1])[torch.arange(count) % 5].clamp(max=spec.max_shift)
    shift = torch.stack([scale, scale // 2], dim=1) * torch.tensor([1, 0, 1, 1])[torch.arange(count) % 4, None]
    ids_keep = torch.rand(count, spec.grid[0] * spec.grid[1], generator=generator).argsort(dim=1)[:, :2].sort(dim=1).values
    flip = torch.arange(count) % 2 == 1
    return canvas, torch.tensor(sizes), Draws(RegionDraws(torch.tensor(boxes), flip, scale, shift), ids_keep), spec, options


WHOLE = [0.0, 0.0, 1.0, 1.0]
EDGES = [
    *(WHOLE, [0.0, 0.0, 0.011, 0.021], [0.5, 0.0, 0.503, 1.0]),
    *([0.0, 0.0, 1.0000001, 1.0000001], [0.983, 0.971, 1.0, 1.0], [0.25, 0.25, 0.75, 0.75]),
]
EDGE_SIZES = [[48, 32], [91, 61], [85, 59], [91, 61], [91, 61], [90, 33]]
BESIDE = [[57, 41], [91, 30]]


def quick_cases() -> dict[str, Case]:
    random = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1)).sort(dim=1).values.flatten(1).tolist()
    cases = {
        "edges": a_case(EDGES, EDGE_SIZES),
        "random": a_case(random, [[91, 61], [77, 50], [31, 17], [7, 3]]),
        "patches of 12": a_case([WHOLE], [[60, 30]], dataclasses.replace(SPEC, img_size=(24, 12), patch_size=12, max_shift=7)),
        "one colour": a_case([WHOLE], [[91, 61]], GREY),
        "faint": a_case([WHOLE], [[91, 61]], GREY),
        "black and white": a_case([[0.2, 0.2, 0.5, 0.5]], [[91, 61]], GREY),
        "beside": a_case([WHOLE] * 2, BESIDE),
        "other beside": a_case([WHOLE] * 2, BESIDE),
        "bf16": a_case([WHOLE] * 2, BESIDE, dtype=torch.bfloat16),
    }
    cases["one colour"][0].fill_(200)
    cases["faint"][0].copy_(200 + (cases["faint"][0] % 16 == 0).byte())
    cases["black and white"][0].copy_(cases["black and white"][0] // 128 * 255)
    other = cases["other beside"][0]
    other[0, 57:], other[0, :, 41:], other[1, :, 30:] = 255, 0, 255
    draws = cases["random"][2]
    cases["random"] = *cases["random"][:2], draws._replace(ids_keep=draws.ids_keep.T.contiguous().T), *cases["random"][3:]
    return cases


@pytest.fixture(scope="module", params=DEVICES)
def outcomes(request: pytest.FixtureRequest) -> dict[str, tuple[Case, Batch]]:
    """All quick cases with the kernel's answers, from one process."""
    cases = quick_cases()
    return {name: (cases[name], batch) for name, batch in zip(cases, run(request.param, *cases.values()), strict=True)}


def assert_equal_to_the_twin(case: Case, ours: Batch) -> None:
    twin = cut_batch(*case[:4])
    twin["pixel_target"] = pixel_target(twin["patches_b"])
    assert ours.keys() == twin.keys()
    for name in ("patches_a", "patches_b"):
        difference = (ours[name] - twin[name]).abs().max()
        assert difference <= PIXEL_TOLERANCE, name
    for name in ("coords_a", "coords_b"):
        assert torch.equal(ours[name], twin[name]), name
    # A target is a pixel over the deviation of its patch.
    allowed = 3 * PIXEL_TOLERANCE / (twin["patches_b"].var(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert ((ours["pixel_target"] - twin["pixel_target"]).abs() <= allowed).all()


@pytest.mark.parametrize("name", ["edges", "random", "patches of 12", "faint", "black and white", "beside"])
def test_the_kernel_gives_what_its_twin_gives(outcomes, name):
    assert_equal_to_the_twin(*outcomes[name])


def test_the_target_of_an_image_of_one_colour_is_no_noise_made_large(outcomes):
    _, batch = outcomes["one colour"]
    assert batch["patches_b"].mean().item() == pytest.approx((200 / 255 - 0.5) / 0.25, abs=1e-5)
    assert batch["pixel_target"].abs().max() < 0.01


def test_pixels_stay_in_the_range_of_the_image(outcomes):
    _, batch = outcomes["black and white"]
    assert batch["patches_b"].min() == pytest.approx(-2)
    assert batch["patches_b"].max() == pytest.approx(2)


def test_what_lies_beside_the_image_on_its_canvas_is_never_seen(outcomes):
    (case, batch), (other_case, other_batch) = outcomes["beside"], outcomes["other beside"]
    assert not torch.equal(case[0], other_case[0])
    assert all(torch.equal(batch[name], other_batch[name]) for name in batch)


def test_bf16_patches_are_the_fp32_ones_to_its_last_bit_and_the_rest_stays_exact(outcomes):
    (_, exact), (_, rounded) = outcomes["beside"], outcomes["bf16"]
    for name, tensor in rounded.items():
        if name.startswith("patches"):
            assert tensor.dtype == torch.bfloat16
            # A GPU rounds, Triton's interpreter cuts off.
            torch.testing.assert_close(tensor.float(), exact[name], rtol=2**-7, atol=1e-6)
        else:
            assert torch.equal(tensor, exact[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("img_size", "max_shift"), [((128, 64), 32), ((256, 128), 64), ((384, 128), 64)])
def test_a_drawn_sample_of_each_size_in_use_gives_what_the_twin_gives(device, img_size, max_shift):
    spec = dataclasses.replace(SPEC, img_size=img_size, max_shift=max_shift)
    height, width = spec.canvas_size
    canvas = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([[height - 7, width - 3]])
    case = canvas, size, draw_batch(torch.tensor([977]), size, spec), spec, {}
    assert_equal_to_the_twin(case, *run(device, case))


@pytest.mark.filterwarnings("ignore:TensorFloat32")  # the compiler's advice
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_step_is_given_the_same_by_either_backend(device, compiled):
    torch.compiler.reset()
    model, size = PersonMAE(size="micro").to(device), torch.tensor([[100, 60], [192, 90]], device=device)
    canvas = torch.randint(0, 256, (2, *SPEC.canvas_size, 3), dtype=torch.uint8, device=device)
    inputs = canvas, size, size, torch.tensor([977, 13], device=device), SPEC
    expected, ours = (choose_prepare(model, crop_backend=name, compiled=compiled)(*inputs) for name in ("torch", "triton"))
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_compiles_for_gpus_that_are_not_here(capability, tmp_path):
    python(COMPILE, str(capability), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
