"""The two ceilings of a machine, on small cases."""

import time

import pytest
import torch

from personmae.bench import ceilings
from personmae.bench.ceilings import Ceilings, measure_ceilings

CPU = torch.device("cpu")


def test_the_best_of_many_blocks_of_calls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings._BUDGET_SECONDS, "cpu", 0.1)
    pauses = iter([0.1, 0.1, 0.03, 0.004, *[0.03] * 100])
    assert 0.004 <= ceilings._best_seconds(lambda: time.sleep(next(pauses)), CPU) < 0.02


def test_both_ceilings_of_this_machine_are_of_the_right_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product by hand and a copy by hand, best of several, are no faster than a ceiling and not a tenth of it."""
    shape = (512, 512, 512)
    monkeypatch.setattr(ceilings, "_ON_CPU", (shape, (64, 64, 64)))
    monkeypatch.setitem(ceilings._BUDGET_SECONDS, "cpu", 0.2)
    monkeypatch.setitem(ceilings._BUFFER_BYTES, "cpu", 1 << 26)
    found = measure_ceilings(CPU)
    assert isinstance(found, Ceilings)
    for precision in ("bf16", "fp32"):
        rates = found.products[precision]
        assert list(rates) == ["512 x 512 x 512", "64 x 64 x 64"]
        assert found.matrix_rate[precision] == max(rates.values()) > 0
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    assert 0.1 < 2 * 512**3 / quickest(lambda: left @ right) / found.products["fp32"]["512 x 512 x 512"] < 3
    source = torch.ones(1 << 26, dtype=torch.uint8)
    target = source.clone()
    assert 0.1 < 2 * (1 << 26) / quickest(lambda: target.copy_(source)) / found.bandwidth < 3


def quickest(call) -> float:
    """Seconds of one call."""
    found = []
    for _ in range(20):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)
