"""Random operands: stored tensors in every format, and the plain reference they are checked with.

Random values multiply as fast as trained ones; only their sizes and dtypes decide the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmr5_kernels import dispatch, reference
from mmr5_kernels.layout import (
    FP8,
    INT4,
    INT8,
    INT8_WEIGHT_ONLY,
    SCALE_DTYPES,
    Format,
    pack_int4,
)

FORMATS: Mapping[str, Format | None] = {
    "bf16": None,  # a dense weight: the comparison with itself shows the noise of the machine
    "int8": INT8,
    "int8-weight-only": INT8_WEIGHT_ONLY,
    "int8-g128": Format("int8", 128),
    "int4": INT4,
    "int4-g64": Format("int4", 64),
    "int4-g32": Format("int4", 32),
    "int4-asymmetric": Format("int4", 128, symmetric=False),
    "fp8": FP8,
}

# Values that are drawn; larger tensors repeat them. A prime, so that rows do not repeat each other.
_POOL = 1_000_003
_BLOCK_WEIGHTS = 1 << 24  # of the reference at a time: 128 MB in fp64


@dataclass(frozen=True)
class Deviation:
    """How far outputs are from the reference, relative to the largest and to the mean square.

    ``largest`` is the largest difference over the largest output, ``rms`` the root of summed
    squares of both.
    """

    largest: float
    rms: float


# Largest and root mean square difference that a right kernel may have. In bf16 the reference rounds
# every weight, a kernel need not (4e-3 by mean square, see ``mmr5_kernels.dispatch``), and both
# round their outputs, by up to 2**-8 of each. In fp32 sums of up to 18,944 products are rounded in
# another order.
TOLERANCES: Mapping[torch.dtype, Deviation] = {
    torch.bfloat16: Deviation(largest=2e-2, rms=5e-3),
    torch.float32: Deviation(largest=1e-4, rms=1e-5),
}


def random_tensors(
    format: Format | None, n: int, k: int, *, bias: bool, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """Stored tensors of a weight [n, k] by suffix; weights of about a hundredth, bias [n] bf16."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    if format is None:
        drawn = (torch.randn(_POOL, generator=generator) * 0.01).to(device, torch.bfloat16)
        tensors["weight"] = _repeated(drawn, n, k)
    else:
        grid = (n, format.groups(k))
        size = {"int4": 8, "int8": 127, "fp8": 448}[format.weights]
        scale = (torch.rand(grid, generator=generator) + 0.5) * 0.02 / size
        tensors["weight_scale"] = scale.to(SCALE_DTYPES[format.scale])
        if format.weights == "fp8":
            codes = (torch.randn(_POOL, generator=generator) * 100).clamp_(-size, size)
            tensors["weight"] = _repeated(codes.to(device, torch.float8_e4m3fn), n, k)
        else:
            low, high = (-8, 8) if format.weights == "int4" else (-127, 128)
            drawn = torch.randint(low, high, (_POOL,), generator=generator, dtype=torch.int8)
            codes = _repeated(drawn.to(device), n, k)
            four = format.weights == "int4"
            tensors |= {"weight_packed": pack_int4(codes)} if four else {"weight": codes}
        if not format.symmetric:
            tensors["weight_zero_point"] = torch.randint(
                -8, 8, grid, generator=generator, dtype=torch.int8
            )
    if bias:
        tensors["bias"] = torch.randn(n, generator=generator).to(torch.bfloat16)
    return {suffix: tensor.to(device) for suffix, tensor in tensors.items()}


def _repeated(pool: Tensor, n: int, k: int) -> Tensor:
    # Through bytes: fp8 has no ``repeat`` of its own on every device.
    kind, size = pool.dtype, pool.element_size()
    raw = pool.view(torch.uint8) if size == 1 else pool
    return raw.repeat(-(-n * k // _POOL))[: n * k].view(kind).view(n, k)


def reference_linear(x: Tensor, format: Format | None, tensors: Mapping[str, Tensor]) -> Tensor:
    """x [M, K] times a stored weight by the specification, some rows of the weight at a time.

    Returns [M, N] in the dtype of x.
    """
    stored = {s: t for s, t in tensors.items() if s not in ("bias", "weight_shape")}
    bias = tensors.get("bias")
    n = next(iter(stored.values())).shape[0]
    rows = max(1, _BLOCK_WEIGHTS // x.shape[1])
    return torch.cat(
        [
            _reference_block(
                x,
                format,
                {s: t[start : start + rows] for s, t in stored.items()},
                None if bias is None else bias[start : start + rows].to(x.dtype),
            )
            for start in range(0, n, rows)
        ],
        dim=1,
    )


def _reference_block(
    x: Tensor, format: Format | None, parts: Mapping[str, Tensor], bias: Tensor | None
) -> Tensor:
    if format is None:
        y = x.double() @ parts["weight"].to(x.dtype).double().T
        return (y if bias is None else y + bias.double()).to(x.dtype)
    specification = {"int8": reference.linear_int8, "fp8": reference.linear_fp8}.get(
        format.activations or "", reference.linear_weight_only
    )
    return specification(x, format, parts, bias)


def deviation(found: Tensor, wanted: Tensor) -> Deviation:
    """How far ``found`` is from ``wanted``, of equal shape; infinite when it is not finite.

    A kernel that returns another shape or dtype deviates infinitely as well.
    """
    if found.shape != wanted.shape or found.dtype != wanted.dtype or not found.isfinite().all():
        return Deviation(float("inf"), float("inf"))
    difference, size = (found.double() - wanted.double()).abs(), wanted.double().abs()
    tiny = torch.finfo(torch.float64).tiny
    return Deviation(
        float(difference.max() / size.max().clamp_min(tiny)),
        float(difference.norm() / size.norm().clamp_min(tiny)),
    )


def copy_prepared(prepared: dispatch.Prepared) -> dispatch.Prepared:
    """The same linear in other memory."""
    operands = {
        layout: {suffix: tensor.clone() for suffix, tensor in parts.items()}
        for layout, parts in prepared.operands.items()
    }
    return replace(prepared, operands=operands)
