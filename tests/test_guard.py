"""Skipped steps and jumps of the loss."""

import pytest
import torch

from personmae.guard import Guard

CPU = torch.device("cpu")


def fed(guard: Guard, *losses: float) -> Guard:
    """Steps of which those with a loss that is not finite are skipped."""
    for loss in losses:
        value = torch.tensor(loss)
        guard.add(value, (~value.isfinite()).float())
    return guard


def test_only_steps_skipped_in_a_row_exhaust_it():
    guard = Guard(CPU, max_skipped_steps=3)
    assert not fed(guard, float("nan"), float("inf"), 1.0, float("nan"), float("nan")).exhausted()
    assert (guard.consecutive, guard.num_skipped) == (2, 4)
    assert fed(guard, float("nan")).exhausted()
    assert guard.blame() == "the loss was not finite on rank 0"


def test_a_gradient_that_overflows_alone_blames_no_rank():
    guard = Guard(CPU, max_skipped_steps=1)
    guard.add(torch.tensor(2.0), torch.tensor(1.0))
    assert guard.exhausted()
    assert guard.blame() == "every rank's loss was finite, the gradient was not"


def test_a_spike_is_told_once_and_does_not_become_usual():
    guard = Guard(CPU, max_skipped_steps=3, spike_factor=1.5)
    for losses in ([1.0, 1.0], [1.2, 1.4], [0.9, 0.8]):
        assert not fed(guard, *losses).spiked()
    assert fed(guard, 1.0, 2.4).spiked()
    assert not fed(guard, 1.0, 1.0).spiked()
    assert fed(guard, 1.6).spiked()


def test_skipped_steps_are_no_part_of_the_usual_loss():
    guard = Guard(CPU, max_skipped_steps=30, spike_factor=1.5)
    assert not fed(guard, 1.0, float("nan")).spiked()
    for _ in range(10):
        assert not fed(guard, float("nan"), float("inf")).spiked()
    assert not fed(guard, 1.4, float("inf")).spiked()
    assert fed(guard, 1.7, float("nan")).spiked()


@pytest.mark.parametrize("first", [1e-6, 1e6])
def test_the_first_interval_is_compared_with_nothing(first):
    assert not fed(Guard(CPU, max_skipped_steps=3, spike_factor=1.1), first).spiked()


def test_without_a_factor_nothing_is_a_spike():
    guard = Guard(CPU, max_skipped_steps=3)
    assert not fed(guard, 1.0).spiked()
    assert not fed(guard, 1e9).spiked()
