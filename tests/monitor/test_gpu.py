"""GPU numbers: the real library without a driver and with a GPU; and, apart from it, what becomes of values that NVML gives.

There is no driver on most machines, so the second part has a library in which values were written down by hand: it shows how
they are scaled and named, not that NVML gives them.
"""

import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from personmae.monitor import gpu

ROOT = Path(__file__).resolve().parents[2]


def values(collector: gpu.GpuCollector) -> dict[tuple[str, ...], float]:
    return {(s.name, *s.labels.values()): s.value for metric in collector.collect() for s in metric.samples}


def has_driver() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


def test_without_a_driver_there_are_no_metrics_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    monkeypatch.setattr(gpu, "_logged", set())
    lines: list[str] = []
    assert gpu.gpu_collectors(lines.append) == []
    assert gpu.gpu_collectors(lines.append) == []
    assert lines == ["no GPU metrics: NVML says NVML Shared Library Not Found"]


@pytest.mark.gpu
def test_a_real_gpu_tells_its_memory_power_and_temperature() -> None:
    if not has_driver():
        pytest.skip("needs an NVIDIA driver")
    found = values(gpu.GpuCollector(pynvml))
    assert 0 < found["personmae_gpu_memory_used_bytes", "0"] < found["personmae_gpu_memory_total_bytes", "0"]
    assert 0 <= found["personmae_gpu_utilization_ratio", "0"] <= 1
    assert 10 < found["personmae_gpu_temperature_celsius", "0"] < 110
    assert 5 < found["personmae_gpu_power_watts", "0"] < 2000


class Written:
    """Stands for pynvml: two GPUs, the second without ECC and without a power sensor; an XID when ``xid`` is set."""

    NVMLError = pynvml.NVMLError

    def __init__(self) -> None:
        self.xid = threading.Event()
        self.without_events: tuple[int, ...] = ()
        self.lost = False
        self.gone: tuple[int, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("nvmlDevice", "nvmlEventSet")):
            raise AssertionError(f"{name} was not written down")
        return getattr(pynvml, name)

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index in self.gone:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        if self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=97 - handle, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=60 << 30, total=80 << 30, free=20 << 30)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 654_321

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return 71

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:  # noqa: N802
        return 0x44 if handle == 0 else 0x1  # power cap and thermal slowdown by hardware; idle

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> int:  # noqa: N802
        assert counter == pynvml.NVML_VOLATILE_ECC
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return {pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED: 12, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED: 1}[kind]

    def nvmlEventSetCreate(self) -> str:  # noqa: N802
        return "events"

    def nvmlDeviceRegisterEvents(self, handle: int, kinds: int, events: str) -> None:  # noqa: N802
        if handle in self.without_events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        assert kinds == pynvml.nvmlEventTypeXidCriticalError

    def nvmlEventSetWait_v2(self, events: str, milliseconds: int) -> SimpleNamespace:  # noqa: N802
        if self.xid.wait(0.05):
            self.xid.clear()
            return SimpleNamespace(device=1, eventData=79)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)


def test_values_are_in_base_units_and_what_a_gpu_does_not_know_is_left_out() -> None:
    found = values(gpu.GpuCollector(Written()))
    assert found["personmae_gpu_info", "0", "GPU-0", "NVIDIA H100 80GB HBM3"] == 1
    assert found["personmae_gpu_utilization_ratio", "1"] == 0.96
    assert found["personmae_gpu_memory_used_bytes", "0"] == 60 * 2**30
    assert found["personmae_gpu_power_watts", "0"] == 654.321
    assert ("personmae_gpu_power_watts", "1") not in found
    assert found["personmae_gpu_temperature_celsius", "0"] == 71
    assert found["personmae_gpu_ecc_errors_total", "0", "uncorrected"] == 1
    assert ("personmae_gpu_ecc_errors_total", "1", "corrected") not in found


def test_reasons_for_which_clocks_are_held_down_are_told_apart() -> None:
    found = values(gpu.GpuCollector(Written()))
    held = {labels[1:] for labels, value in found.items() if labels[0] == "personmae_gpu_throttle_reason" and value}
    assert held == {("0", "sw_power_cap"), ("0", "hw_thermal_slowdown")}


def test_xids_are_counted_by_gpu_and_also_when_that_is_lost() -> None:
    library = Written()
    collector = gpu.GpuCollector(library)
    for number, count in (("1", 1), ("1", 2), ("unknown", 1)):
        library.lost = number == "unknown"
        library.xid.set()
        deadline = time.monotonic() + 5
        while values(collector).get(("personmae_gpu_xid_errors_total", number, "79")) != count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_gpu_that_is_lost_or_tells_no_xids_does_not_hide_the_others() -> None:
    library = Written()
    library.gone = (0,)
    found = values(gpu.GpuCollector(library))
    assert ("personmae_gpu_utilization_ratio", "0") not in found
    assert found["personmae_gpu_utilization_ratio", "1"] == 0.96
    library = Written()
    library.without_events = (0,)
    collector = gpu.GpuCollector(library)
    library.xid.set()
    deadline = time.monotonic() + 5
    while values(collector).get(("personmae_gpu_xid_errors_total", "1", "79")) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_documented_gpu_metrics_are_those_that_are_exported() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .* \| GPU \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    registry = CollectorRegistry()
    registry.register(gpu.GpuCollector(Written()))
    assert generate_latest(registry)
    metrics: list[Metric] = list(registry.collect())
    assert dict(rows) == {m.name + "_total" * (m.type == "counter"): m.type for m in metrics}
