"""The two ceilings of a machine, on small cases."""

import pytest
import torch

from personmae.bench import ceilings
from personmae.bench.ceilings import Ceilings, measure_ceilings, require_native
from personmae.errors import UserError
from personmae.precision import native_cpu

CPU = torch.device("cpu")
PRECISIONS = ("bf16", "fp32") if native_cpu().bf16 else ("fp32",)


class Clock:
    """Seconds that pass only when somebody says so, or ``tick`` of them at each look."""

    def __init__(self, tick: float = 0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def test_the_best_of_many_blocks_of_calls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings._BUDGET_SECONDS, "cpu", 0.1)
    clock, pauses = Clock(), iter([0.1, 0.1, 0.03, 0.004, *[0.03] * 100])
    monkeypatch.setattr(ceilings.time, "perf_counter", clock)

    def call() -> None:
        clock.now += next(pauses)

    assert ceilings._best_seconds(call, CPU) == pytest.approx(0.004)


def test_rates_count_the_operations_and_the_bytes_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second at each look, a call takes one: a rate is what was done in it."""
    monkeypatch.setattr(ceilings, "_ON_CPU", ((32, 64, 128), (16, 16, 16)))
    monkeypatch.setitem(ceilings._BUFFER_BYTES, "cpu", 1 << 16)
    monkeypatch.setattr(ceilings.time, "perf_counter", Clock(tick=1.0))
    found = measure_ceilings(CPU, PRECISIONS)
    assert isinstance(found, Ceilings)
    for precision in PRECISIONS:
        assert found.products[precision] == {"32 x 64 x 128": 2 * 32 * 64 * 128, "16 x 16 x 16": 2 * 16**3}
        assert found.matrix_rate[precision] == 2 * 32 * 64 * 128
    assert found.bandwidth == 2 * (1 << 16)


def test_what_a_machine_has_no_instructions_for_is_left_out_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert require_native(["bf16", "fp32"], CPU) == ("fp32",)
    assert capsys.readouterr().out.startswith("bf16 is left out: ")
    assert require_native(["auto", "fp32"], CPU) == ("fp32",)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"bf16 cannot be measured here, since .*. Give fp32"):
        require_native(["bf16"], CPU)
    monkeypatch.setattr(ceilings, "_ON_CPU", ((64, 64, 64),))
    monkeypatch.setitem(ceilings._BUDGET_SECONDS, "cpu", 0.01)
    monkeypatch.setitem(ceilings._BUFFER_BYTES, "cpu", 1 << 20)
    assert list(measure_ceilings(CPU, ["fp32"]).matrix_rate) == ["fp32"]
