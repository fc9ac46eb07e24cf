"""What is counted of a step: operations as torch counts them, weights as the model has them, bytes between two bounds."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from personmae.bench.counts import COMPUTE_BYTES, MODELS, OTHERS, QKV, STAGES, Stage, Work, count_stages, spec_at
from personmae.model.personmae import PersonMAE
from personmae.model.vit import SIZES

_ATEN = torch.ops.aten
NUM_IMAGES = 2
WATCHED = ("all", "products")


def work_of(size: str, precision: str = "bf16") -> Work:
    return Work(size, spec_at(MODELS[size]), precision)


class Traffic(TorchDispatchMode):
    """Bytes in and out of every operation, and of the products with weights alone; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            moved = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
            self.all += moved
            self.products += moved * (func in (_ATEN.mm.default, _ATEN.addmm.default))
        return result


def run_stages(work: Work, num_images: int, watch: Any) -> dict[str, Any]:
    """What ``watch()``, entered around each stage of the real model, has seen of it."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[work.precision]
    model = PersonMAE(size=work.size, compute_dtype=dtype)
    batch = {
        "patches_a": torch.randn(num_images, work.num_visible, work.patch_dim),
        "coords_a": torch.rand(num_images, work.num_visible, 2),
        "patches_b": torch.randn(num_images, work.num_patches, work.patch_dim),
        "coords_b": torch.rand(num_images, work.num_patches, 2),
    }
    seen: dict[str, Any] = {}

    def enter(name: str) -> Any:
        seen[name] = watch()
        return seen[name]

    with torch.autocast("cpu", dtype, dtype != torch.float32):
        with enter("teacher"), torch.no_grad():  # as Teacher.forward; its copy of an encoder cannot be made of fake tensors
            features = model.encoder.forward_features(batch["patches_b"], batch["coords_b"])
            F.layer_norm(features[:, 1:].float(), features.shape[-1:])
        with enter("student forward"):
            tokens = model.encoder(batch["patches_a"], batch["coords_a"])
        with enter("student backward"):
            tokens.backward(torch.ones_like(tokens))
        for name, decoder in (("pixel decoder", model.pixel_decoder), ("feature decoder", model.feature_decoder)):
            assert decoder
            given = tokens.detach().requires_grad_()
            with enter(name):
                found = decoder(given, batch["coords_b"])
                found.backward(torch.ones_like(found))
    return seen


@pytest.mark.parametrize("size", MODELS)
def test_the_operations_of_each_stage_are_what_torch_counts_on_the_real_model(size: str) -> None:
    work = work_of(size, "fp32")
    stages = count_stages(work)
    with FakeTensorMode():
        seen = run_stages(work, NUM_IMAGES, lambda: FlopCounterMode(display=False))
    for name, counter in seen.items():
        assert NUM_IMAGES * stages[name].flops == pytest.approx(counter.get_total_flops(), rel=1e-3), name


@pytest.mark.parametrize("size", MODELS)
def test_the_stages_add_up_to_what_runs_report(size: str) -> None:
    work = work_of(size)
    stages = count_stages(work)
    assert tuple(stages) == STAGES
    assert sum(stage.flops for name, stage in stages.items() if name != "inputs") == pytest.approx(work.flops)


@pytest.mark.parametrize("size", MODELS)
def test_optimizer_and_average_move_every_parameter_of_the_real_model(size: str) -> None:
    stages = count_stages(work_of(size))
    with torch.device("meta"):
        model = PersonMAE(size=size)
    params, of_encoder = (sum(p.numel() for p in module.parameters()) for module in (model, model.encoder))
    assert stages["optimizer"].step_bytes == 32 * params
    assert stages["average"].step_bytes == 12 * of_encoder


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("size", ["micro", "small"])
def test_the_least_bytes_are_those_of_the_products_and_little_beside_them(size: str, precision: str) -> None:
    """Without fusion every operation moves bytes; the products with weights always do, and are nearly half of what is left."""
    work = work_of(size, precision)
    stages = count_stages(work)
    with FakeTensorMode():
        one, two = (run_stages(work, num_images, Traffic) for num_images in (8, 16))
    every, products = ({name: (getattr(two[name], what) - getattr(one[name], what)) / 8 for name in one} for what in WATCHED)
    for name in one:
        assert 1.9 * products[name] < stages[name].bytes < 0.4 * every[name], name
    act, dim, depth = COMPUTE_BYTES[precision], work.feature_dim, SIZES[size]["depth"]
    blocks = {
        name: depth * dim * (1 + n) for name, n in (("teacher", work.num_patches), ("student backward", work.num_visible))
    }
    embed = work.patch_dim + dim
    assert products["teacher"] == act * ((QKV + OTHERS) * blocks["teacher"] + embed * work.num_patches)
    assert products["student backward"] == act * (2 * (QKV + OTHERS) * blocks["student backward"] + embed * work.num_visible)


def test_a_stage_takes_as_long_as_the_ceiling_it_meets() -> None:
    stage = Stage(flops=6.0, bytes=2.0, step_bytes=10.0)
    assert stage.seconds(5, matrix_rate=3.0, bandwidth=4.0) == 10.0  # 30 operations; 20 bytes in 5 seconds
    assert stage.seconds(5, matrix_rate=3.0, bandwidth=1.0) == 20.0
    assert stage.intensity(5) == 1.5
    assert stage + stage == Stage(12.0, 4.0, 20.0)
