"""What an engine refuses, and what it needs of DeepSpeed: nothing here starts a process."""

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from scenario import build_model, build_optimizer
from torch import nn

from personmae.engine import deepspeed
from personmae.engine.base import PortableState, full_shapes, guarded_update, require_whole
from personmae.engine.native import NativeEngine
from personmae.errors import UserError

PLAN = {"micro_batch_size": 4, "grad_accum_steps": 2, "num_parameters": 1000}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_dict_says_what_deepspeed_would_otherwise_choose(stage):
    config = deepspeed.deepspeed_config(**PLAN, zero_stage=stage, extra={})
    assert config["gradient_clipping"] == 0.0
    assert config["steps_per_print"] is None
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] == 8
    assert "bf16" not in config
    assert config["zero_optimization"].get("compute_grad_norm", True) == (stage in (0, 3))


def test_extra_is_merged_last_and_section_by_section():
    extra = {"zero_optimization": {"reduce_bucket_size": 5}, "wall_clock_breakdown": True}
    config = deepspeed.deepspeed_config(**PLAN, zero_stage=1, extra=extra)
    assert config["zero_optimization"]["reduce_bucket_size"] == 5
    assert config["zero_optimization"]["stage"] == 1
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"bf16": {"enabled": True}}, "'bf16'"),
        ({"gradient_clipping": 1.0}, "'gradient_clipping'"),
        ({"amp": {"enabled": True}}, "'amp'"),
        ({"elasticity": {"enabled": True}}, "'elasticity'"),
        ({"zero_optimization": {"stage": 2}}, "'zero_optimization.stage'"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "'zero_optimization.offload_optimizer'"),
    ],
)
def test_extra_may_not_say_what_the_configuration_says(extra, named):
    with pytest.raises(UserError, match="Leave it out") as caught:
        deepspeed.deepspeed_config(**PLAN, zero_stage=1, extra=extra)
    assert named in str(caught.value)


@pytest.mark.parametrize("section", [None, 3, ["stage"]])
def test_a_section_of_extra_that_is_none_is_refused(section):
    with pytest.raises(UserError, match=r"needs settings in zero_optimization, got "):
        deepspeed.deepspeed_config(**PLAN, zero_stage=1, extra={"zero_optimization": section})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_another_deepspeed_is_refused_with_what_to_do(stage):
    with pytest.raises(UserError, match=r"averaged_gradients.*version 9\.9 does not have: install the version") as caught:
        deepspeed.require_private_names(SimpleNamespace(), stage, "9.9")
    assert "run tests/engine" in str(caught.value)


def test_the_installed_deepspeed_still_has_the_signatures_and_defaults_that_are_relied_on():
    """When this fails, read the changes of DeepSpeed's ZeRO optimizers and mend engine/deepspeed.py."""
    import inspect

    ds = deepspeed._import_deepspeed()
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for name in ("safe_get_full_fp32_param", "safe_get_full_optimizer_state", "safe_set_local_fp32_param"):
        assert callable(getattr(ds.utils, name))
    assert callable(ds.utils.safe_set_local_optimizer_state)
    assert list(inspect.signature(ds.zero.GatheredParameters).parameters)[:2] == ["params", "modifier_rank"]
    for optimizer, stage in ((DeepSpeedZeroOptimizer, 1), (DeepSpeedZeroOptimizer_Stage3, 3)):
        source = inspect.getsource(optimizer)
        for name in deepspeed._PRIVATE[stage]:
            assert f"self.{name}" in source, name
        assert "self.optimizer.step()" in source or "optimizer.step()" in source  # ours, which reads found_inf


def test_a_state_of_another_model_is_refused_before_anything_is_changed():
    model = build_model()
    engine = NativeEngine(model, build_optimizer(model), grad_accum_steps=1, max_norm=None)
    state = engine.portable_state()
    assert state is not None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = state.params | {"encoder.cls_token": torch.zeros(1, 1, 3)}
    with pytest.raises(UserError, match=r"1 differ \(encoder.cls_token\)"):
        engine.load_portable(PortableState(wrong, {}, 0))
    missing = {name: tensor for name, tensor in state.params.items() if name != "encoder.norm.bias"}
    with pytest.raises(UserError, match=r"1 differ \(encoder.norm.bias\)"):
        engine.load_portable(PortableState(missing, {}, 0))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_parameters_that_are_not_fp32_are_refused():
    model = build_model().bfloat16()
    with pytest.raises(UserError, match=r"engines train fp32 parameters, encoder\.cls_token is torch\.bfloat16"):
        NativeEngine(model, build_optimizer(model), grad_accum_steps=1, max_norm=None)


def test_a_compiled_module_is_refused_at_stage_3():
    model = build_model()
    model.compile()
    plan = {"micro_batch_size": 4, "grad_accum_steps": 2, "max_norm": None, "extra": {}}
    with pytest.raises(UserError, match=r"Set train\.compile=false"):
        deepspeed.DeepSpeedEngine(model, build_optimizer(model), **plan, zero_stage=3)


def test_frozen_parameters_are_refused_where_parameters_are_flattened():
    model = build_model()
    model.encoder.cls_token.requires_grad_(False)
    plan = {"micro_batch_size": 4, "grad_accum_steps": 2, "max_norm": None, "extra": {}}
    with pytest.raises(UserError, match=r"encoder\.cls_token is frozen. Use engine\.name=native"):
        deepspeed.DeepSpeedEngine(model, build_optimizer(model), **plan, zero_stage=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_first_step_that_is_skipped_leaves_parameters_and_counters_where_they_were(bad):
    linear = nn.Linear(3, 2)
    groups = [{"params": list(linear.parameters()), "base_lr": 0.1, "lr": 0.1}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    before = [parameter.detach().clone() for parameter in linear.parameters()]
    for parameter in linear.parameters():
        parameter.grad = torch.ones_like(parameter)
    done = guarded_update(optimizer, 1.0, torch.tensor(bad), 1.0)
    optimizer.step()
    assert done.skipped == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, linear.parameters(), strict=True))
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in optimizer.state.values())
    guarded_update(optimizer, 0.5, torch.tensor(1.0), None)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, linear.parameters(), strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_skipped_even_where_its_gradient_is_finite(bad):
    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"loss": self.linear(batch["x"]).mean() + batch["added"]}

    module = Overflows()
    groups = [{"params": list(module.parameters()), "base_lr": 0.1, "lr": 0.1}]
    engine = NativeEngine(module, torch.optim.AdamW(groups, fused=True), grad_accum_steps=2, max_norm=None)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    for added, last in ((bad, False), (0.0, True)):
        losses = engine.forward_backward({"x": torch.ones(2, 3), "added": torch.tensor(added)}, last_micro=last)
        assert math.isfinite(losses["loss"]) == (added == 0.0)
    assert engine.step(1.0).skipped == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    for last in (False, True):
        engine.forward_backward({"x": torch.ones(2, 3), "added": torch.tensor(0.0)}, last_micro=last)
    done = engine.step(1.0)
    assert done.skipped == 0.0
    assert done.grad_norm == pytest.approx(2.0)  # of a mean over two micro-batches: ones for three weights and a bias
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("spoil", [lambda whole: whole[:1], lambda whole: whole.bfloat16()])
def test_an_engine_that_gives_back_shards_or_bf16_is_refused_before_the_first_step(spoil):
    class Shards(NativeEngine):
        @contextlib.contextmanager
        def full_params(self, module: nn.Module) -> Iterator[list[torch.Tensor]]:
            yield [spoil(parameter) if parameter.ndim > 1 else parameter for parameter in module.parameters()]

    module = nn.Linear(3, 2)
    groups = [{"params": list(module.parameters()), "base_lr": 0.1, "lr": 0.1}]
    engine = Shards(module, torch.optim.AdamW(groups, fused=True), grad_accum_steps=1, max_norm=None)
    with pytest.raises(UserError, match=r"must give weight back as fp32 \(2, 3\) and gives .*Use engine\.name=native"):
        require_whole(engine, full_shapes(module))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_of_the_plain_engine_waits_for_the_device():
    model = build_model().cuda()
    engine = NativeEngine(model, build_optimizer(model), grad_accum_steps=1, max_norm=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.step(1.0)  # the optimizer's state is made here
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
