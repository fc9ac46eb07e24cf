"""Metrics of this host's GPUs, from NVML through nvidia-ml-py. There are none without a driver.

A cluster's DCGM exporter has more, under other names. This is for hosts without one.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_THROTTLES: Final = {
    "sw_power_cap": "nvmlClocksEventReasonSwPowerCap",
    "hw_slowdown": "nvmlClocksThrottleReasonHwSlowdown",
    "hw_thermal_slowdown": "nvmlClocksThrottleReasonHwThermalSlowdown",
    "hw_power_brake_slowdown": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
    "sw_thermal_slowdown": "nvmlClocksEventReasonSwThermalSlowdown",
    "sync_boost": "nvmlClocksEventReasonSyncBoost",
}
_WAIT_MILLISECONDS = 5000
_logged: set[str] = set()


def gpu_collectors(log: Callable[[str], object] = print) -> list[Collector]:
    """One collector for the GPUs of this host, or none where NVML cannot be used, which is logged once."""
    import pynvml

    try:
        return [GpuCollector(pynvml)]
    except pynvml.NVMLError as error:
        line = f"no GPU metrics: NVML says {error}"
        if line not in _logged:
            log(line)
        _logged.add(line)
        return []


class GpuCollector(Collector):
    """Numbers of every GPU, by its index. What a GPU does not know is left out. ``library`` is pynvml.

    Raises:
        NVMLError: there is no driver.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        library.nvmlInit()
        self._handles: dict[int, Any] = {}
        for index in range(library.nvmlDeviceGetCount()):
            with self._unknown():  # one that is lost does not hide the others
                self._handles[index] = library.nvmlDeviceGetHandleByIndex(index)
        self._xids: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._listen()

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        nvml = self._library
        info = GaugeMetricFamily("personmae_gpu_info", "Which GPU has which index", labels=["gpu", "uuid", "name"])
        for index, handle in self._handles.items():
            with self._unknown():
                info.add_metric([str(index), nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)], 1)
        yield info
        yield self._gauge("utilization_ratio", "Share of time with a kernel", self._utilization)
        yield self._gauge("memory_used_bytes", "Memory in use, by whomever", lambda h: nvml.nvmlDeviceGetMemoryInfo(h).used)
        yield self._gauge("memory_total_bytes", "Memory that there is", lambda h: nvml.nvmlDeviceGetMemoryInfo(h).total)
        yield self._gauge("power_watts", "Power drawn", lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1000)
        yield self._gauge("temperature_celsius", "Temperature", self._temperature)
        yield self._throttles()
        yield self._ecc_errors()
        yield self._xid_errors()

    def _gauge(self, name: str, text: str, read: Callable[[Any], float]) -> Metric:
        gauge = GaugeMetricFamily(f"personmae_gpu_{name}", text, labels=["gpu"])
        for index, handle in self._handles.items():
            with self._unknown():
                gauge.add_metric([str(index)], read(handle))
        return gauge

    def _utilization(self, handle: Any) -> float:
        return self._library.nvmlDeviceGetUtilizationRates(handle).gpu / 100

    def _temperature(self, handle: Any) -> float:
        return self._library.nvmlDeviceGetTemperature(handle, self._library.NVML_TEMPERATURE_GPU)

    def _throttles(self) -> Metric:
        text = "1 while clocks are held down for the reason"
        gauge = GaugeMetricFamily("personmae_gpu_throttle_reason", text, labels=["gpu", "reason"])
        for index, handle in self._handles.items():
            with self._unknown():
                bits = self._library.nvmlDeviceGetCurrentClocksEventReasons(handle)
                for reason, name in _THROTTLES.items():
                    gauge.add_metric([str(index), reason], float(bool(bits & getattr(self._library, name))))
        return gauge

    def _ecc_errors(self) -> Metric:
        nvml, text = self._library, "Memory errors since the driver was loaded"
        counter = CounterMetricFamily("personmae_gpu_ecc_errors", text, labels=["gpu", "type"])
        kinds = {"corrected": nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, "uncorrected": nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED}
        for index, handle in self._handles.items():
            for name, kind in kinds.items():
                with self._unknown():
                    count = nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC)
                    counter.add_metric([str(index), name], count)
        return counter

    def _xid_errors(self) -> Metric:
        counter = CounterMetricFamily("personmae_gpu_xid_errors", "XIDs since this began", labels=["gpu", "xid"])
        with self._lock:
            for (gpu, xid), count in self._xids.items():
                counter.add_metric([gpu, xid], count)
        return counter

    def _unknown(self) -> contextlib.AbstractContextManager[None]:
        """Pass over an NVMLError: the GPU has no such sensor, or it has fallen off the bus."""
        return contextlib.suppress(self._library.NVMLError)

    def _listen(self) -> None:
        """Count XIDs in a thread, from NVML's events. Not every GPU has them."""
        nvml, uuids = self._library, {}
        try:
            events = nvml.nvmlEventSetCreate()
        except nvml.NVMLError:
            return
        for index, handle in self._handles.items():
            with self._unknown():
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
                uuids[nvml.nvmlDeviceGetUUID(handle)] = str(index)
        threading.Thread(target=self._count_xids, args=(events, uuids), name="xid", daemon=True).start()

    def _count_xids(self, events: Any, uuids: dict[str, str]) -> None:
        nvml = self._library
        while True:
            try:
                event = nvml.nvmlEventSetWait_v2(events, _WAIT_MILLISECONDS)
            except nvml.NVMLError as error:
                if error.value == nvml.NVML_ERROR_TIMEOUT:
                    continue
                return  # the driver is gone
            gpu = "unknown"
            with self._unknown():  # after XID 79 it may not answer
                gpu = uuids.get(nvml.nvmlDeviceGetUUID(event.device), gpu)
            with self._lock:
                self._xids[gpu, str(event.eventData)] += 1
