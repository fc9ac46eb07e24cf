"""The two ceilings of a machine, on small cases."""

import time

import pytest
import torch

from personmae.bench import ceilings
from personmae.bench.ceilings import Ceilings, measure_ceilings, require_native
from personmae.errors import UserError
from personmae.precision import native_cpu

CPU = torch.device("cpu")
PRECISIONS = ("bf16", "fp32") if native_cpu().bf16 else ("fp32",)


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
    found = measure_ceilings(CPU, PRECISIONS)
    assert isinstance(found, Ceilings)
    for precision in PRECISIONS:
        rates = found.products[precision]
        assert list(rates) == ["512 x 512 x 512", "64 x 64 x 64"]
        assert found.matrix_rate[precision] == max(rates.values()) > 0
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    assert 0.1 < 2 * 512**3 / quickest(lambda: left @ right) / found.products["fp32"]["512 x 512 x 512"] < 3
    source = torch.ones(1 << 26, dtype=torch.uint8)
    target = source.clone()
    assert 0.1 < 2 * (1 << 26) / quickest(lambda: target.copy_(source)) / found.bandwidth < 3


def test_what_a_machine_has_no_instructions_for_is_left_out_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert require_native(["bf16", "fp32"], CPU) == ("fp32",)
    assert capsys.readouterr().out.startswith("bf16 is left out: ")
    assert require_native(["auto", "fp32"], CPU) == ("fp32",)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"bf16 cannot be measured here, since .*; give fp32"):
        require_native(["bf16"], CPU)
    monkeypatch.setattr(ceilings, "_ON_CPU", ((64, 64, 64),))
    monkeypatch.setitem(ceilings._BUDGET_SECONDS, "cpu", 0.01)
    monkeypatch.setitem(ceilings._BUFFER_BYTES, "cpu", 1 << 20)
    assert list(measure_ceilings(CPU, ["fp32"]).matrix_rate) == ["fp32"]


def quickest(call) -> float:
    """Seconds of one call."""
    found = []
    for _ in range(20):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)
