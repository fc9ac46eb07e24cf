"""An engine of each kind on two ranks trains what the plain loop does; ``test_parity.py`` has them all, in make test-all."""

import math
from pathlib import Path

import pytest
import torch
from engine_runs import POISONED, Results, assert_same_losses, assert_same_state
from safetensors.torch import save_file
from scenario import MIDDLE, SOME_ENGINES, STEPS

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("engine", SOME_ENGINES)
def test_losses_weights_moments_and_teacher_are_those_of_the_plain_loop(some_results: Results, engine: str) -> None:
    assert_same_losses(some_results, f"{engine}-2", "plain")
    assert_same_state(some_results, f"{engine}-2", "plain", MIDDLE)
    assert_same_state(some_results, f"{engine}-2", "plain")
    assert some_results.record(f"{engine}-2")["teachers_agree"]


@pytest.mark.parametrize("engine", SOME_ENGINES)
def test_clipping_and_skipped_steps_are_those_of_the_plain_loop(some_results: Results, engine: str) -> None:
    assert_same_losses(some_results, f"{engine}-2-clipped", "plain-clipped")
    assert_same_state(some_results, f"{engine}-2-clipped", "plain-clipped")
    record = some_results.record(f"{engine}-2-clipped")
    assert record["skipped"] == [float(str(step) in POISONED) for step in range(STEPS)]
    assert record["untouched"]
    assert record["skips_agree"]


@pytest.mark.parametrize("engine", SOME_ENGINES)
def test_the_identity_loss_trains_on_two_ranks_as_it_does_on_one(some_results: Results, engine: str) -> None:
    # Its covariances amplify rounding: as on AVX2 weights came 2e-6 apart, moments and gradient norms 6e-6.
    assert_same_losses(some_results, f"{engine}-2-identity", "plain-identity", rel=2e-5)
    assert_same_state(some_results, f"{engine}-2-identity", "plain-identity", rel=2e-5)
    assert some_results.record("plain-identity")["losses"][0] > some_results.record("plain")["losses"][0] + 0.1


@pytest.mark.parametrize(("first", "then"), [*zip(SOME_ENGINES, SOME_ENGINES[1:] + SOME_ENGINES[:1], strict=True)])
def test_the_state_of_one_on_two_ranks_goes_on_in_another_on_one(some_results: Results, first: str, then: str) -> None:
    name = f"{first}-2-then-{then}-1"
    assert some_results.record(name)["came_back"]
    assert_same_losses(some_results, name, "plain")
    assert_same_state(some_results, name, "plain")


def test_runs_that_are_nothing_but_nan_are_not_the_same(tmp_path: Path) -> None:
    names, results = ("ours", "theirs"), Results(tmp_path)
    state = {f"{kind}/w": torch.full((3,), math.nan) for kind in ("params", "exp_avg", "exp_avg_sq", "teacher")}
    for name in names:
        (tmp_path / f"{name}.json").write_text('{"losses": [NaN, NaN], "norms": [NaN]}')
        save_file(state | {"num_updates": torch.tensor(8)}, tmp_path / f"{name}-{STEPS}.safetensors")
    with pytest.raises(AssertionError):
        assert_same_losses(results, *names)
    with pytest.raises(AssertionError):
        assert_same_state(results, *names)
