"""What decides how fast a machine is, and whether two recordings are of the same one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Memory is left out: what the kernel reserves for itself differs between boots of one machine.
DECIDING = (
    "host_cpu",
    "cores",
    "threads",
    "instructions",
    "gpu",
    "driver",
    "cuda",
    "torch",
    "python",
    "os",
)


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """The machine as it stands in result files; ``id`` has 16 hex digits over what decides speed.

    ``threads`` are those torch uses now: set them first. ``gpu``, ``driver`` and ``cuda`` are None
    unless ``device`` is a CUDA one. ``load`` is how many processes wanted to run in the last
    minute, this one included; it is not part of the id.
    """
    gpu = _gpu(torch.device(device))
    found: dict[str, Any] = {
        "host_cpu": cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
    }
    deciding = json.dumps([found[key] for key in DECIDING]).encode()
    return {
        "id": hashlib.sha256(deciding).hexdigest()[:16],
        **found,
        "device": device,
        "memory_bytes": _memory_bytes(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def machine_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What of the things that decide speed differs, readably; empty for the same machine."""
    return [f"{key}: {a.get(key)} and {b.get(key)}" for key in DECIDING if a.get(key) != b.get(key)]


def cpu_name() -> str:
    """The processor's model name, ``unknown`` where the system does not say."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"gpu": None, "driver": None, "cuda": None}
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    """The driver's version as its kernel module states it; NVML may be absent."""
    version = Path("/sys/module/nvidia/version")
    return version.read_text(encoding="utf-8").strip() if version.is_file() else None


def _cores() -> int | None:
    """Those this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # no POSIX
        return None
