"""What the machine can do at most, measured: the denominators of every share that is reported.

A vendor's peak is reached by nobody, so shares are of what a plain copy and a plain matrix product
reach here, in the same run. Best of several repeats: a ceiling is a capability, not an average.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # far beyond the last cache
_SIDE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the products
_TINY_BYTES, _TINY_SIDE = 1 << 20, 64
_LEAST_REPEATS = 3


def measure_ceilings(
    device: str, dtypes: Iterable[str], *, seconds: float = 1.0, dry_run: bool = False
) -> dict[str, Any]:
    """Copy rate and matrix product rates of ``device``.

    ``copy_bytes_per_s`` counts bytes read and bytes written; ``read_bytes_per_s`` is a reduction
    over the same memory, and ``memory_bytes_per_s`` the greater of both. ``matmul_flops`` is by
    dtype (``float32``, ``bfloat16``, ``int8``, ``fp8``), two operations per multiply-add; one that
    this device or torch cannot do is in ``missing`` with the reason. Each measurement takes about
    ``seconds``; ``dry_run`` measures sizes that say nothing.
    """
    where = torch.device(device)
    if where.type not in _SIDE:
        raise ValueError(f"no ceilings of device {device!r} are measured; pass cpu or cuda")
    nbytes = _TINY_BYTES if dry_run else _COPY_BYTES[where.type]
    side = _TINY_SIDE if dry_run else _SIDE[where.type]
    limit = 0.0 if dry_run else seconds
    copied, read = _memory_rates(nbytes, where, limit)
    found: dict[str, Any] = {
        "copy_bytes_per_s": copied,
        "read_bytes_per_s": read,
        "memory_bytes_per_s": max(copied, read),
        "matmul_flops": {},
        "missing": {},
        "dry_run": dry_run,
    }
    for dtype in dtypes:
        try:
            call = _product(dtype, side, where)
            found["matmul_flops"][dtype] = 2 * side**3 / _best(call, where, limit)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            found["missing"][dtype] = str(error).splitlines()[0]
    return found


def _memory_rates(nbytes: int, device: torch.device, limit: float) -> tuple[float, float]:
    source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = 2 * nbytes / _best(lambda: target.copy_(source), device, limit)
    return copied, nbytes / _best(lambda: source.sum(), device, limit)


def _product(dtype: str, side: int, device: torch.device) -> Callable[[], Tensor]:
    if dtype in ("float32", "bfloat16"):
        kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        a = torch.randn(side, side, device=device).to(kind)
        return lambda: a @ a
    if dtype == "int8":
        if device.type == "cpu":
            raise NotImplementedError("torch's int8 product on a CPU is a scalar loop")
        codes = torch.randint(-127, 127, (side, side), dtype=torch.int8, device=device)
        return lambda: torch._int_mm(codes, codes.t())
    if dtype == "fp8":
        if device.type == "cpu":
            raise NotImplementedError("no fp8 product on a CPU")
        a = torch.randn(side, side, device=device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.bfloat16)
    raise ValueError(f"dtype {dtype!r} is unknown; pass float32, bfloat16, int8 or fp8")


def _best(call: Callable[[], Tensor], device: torch.device, limit: float) -> float:
    """Least seconds of one call, of as many as fit in ``limit`` after one untimed."""
    call()
    _wait(device)
    best, began, repeats = float("inf"), time.perf_counter(), 0
    while repeats < _LEAST_REPEATS or time.perf_counter() - began < limit:
        start = time.perf_counter()
        call()
        _wait(device)
        best = min(best, time.perf_counter() - start)
        repeats += 1
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
