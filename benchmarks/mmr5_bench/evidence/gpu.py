"""What the GPU did while something was measured: clocks, heat, power, throttling, by NVML.

A clock that fell in the middle of a run explains a figure that nothing else does. The sampler is a
thread that asks the driver a few times a second, which costs the GPU nothing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

# NVML's clock event reasons that mean "slower than asked for", by bit (nvml.h).
_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
}


@dataclass
class GpuSampler:
    """Samples the GPU behind ``device`` while it is entered.

    ``missing`` says why there is nothing: no CUDA device, or no NVML library for Python.
    """

    device: str = "cpu"
    every_s: float = 0.2
    missing: str | None = None
    _samples: list[tuple[int, int, float, int]] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> GpuSampler:
        if torch.device(self.device).type != "cuda":
            self.missing = "no CUDA device is measured"
            return self
        try:
            import pynvml
        except ImportError:
            self.missing = "nvidia-ml-py is not installed"
            return self
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{_uuid(self.device)}")
        except pynvml.NVMLError as error:
            self.missing = f"NVML: {error}"
            return self
        self._over.clear()
        self._thread = threading.Thread(target=self._run, args=(pynvml, handle), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._over.set()
            self._thread.join()

    def summary(self) -> dict[str, Any] | None:
        """Clock in MHz, temperature in °C, power in W, throttling; None when nothing was read."""
        if not self._samples:
            return None
        clocks, heat, power, bits = zip(*self._samples, strict=True)
        seen = {name for bit, name in _REASONS.items() if any(bit & found for found in bits)}
        return {
            "samples": len(clocks),
            "clock_mhz": _spread(clocks),
            "temperature_c": _spread(heat),
            "power_w": _spread(power),
            "throttled": bool(seen),
            "reasons": sorted(seen),
        }

    def _run(self, nvml: Any, handle: Any) -> None:
        while True:
            try:
                self._samples.append(
                    (
                        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                        nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                        nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                        nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
                    )
                )
            except nvml.NVMLError as error:
                self.missing = f"NVML: {error}"
                return
            if self._over.wait(self.every_s):
                return


def _uuid(device: str) -> str:
    return str(torch.cuda.get_device_properties(torch.device(device)).uuid)


def _spread(values: tuple[float, ...]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
