"""What of a CPU and of installed packages decides how fast backends are on it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
)
"""Flags of ``/proc/cpuinfo``: wide registers, products of 8-bit codes, bfloat16 arithmetic."""
PACKAGES = ("transformers", "onnxruntime", "onnx")


def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, bool]:
    """Which of :data:`INSTRUCTIONS` the first processor has; empty where the file is not there."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    flags = next(
        (line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), None
    )
    return {} if flags is None else {name: name in flags for name in INSTRUCTIONS}


def versions() -> dict[str, str]:
    """Versions of :data:`PACKAGES`; ``missing`` for what is not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
