"""int4 linears of few rows in CUDA C++: the launcher of ``csrc/w4_linear.cu``.

The specification is :func:`mmr5_kernels.fused.fused_linear`. A weight is not rounded here, where
the reference rounds each to bf16, so that the result is the nearer of the two to fp64.

Not run on a GPU yet: only chosen when asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Protocol

import torch
from torch import Tensor

from mmr5_kernels.cuda import launch, nvrtc, w4_layout
from mmr5_kernels.cuda.w4_plan import DEFAULT, Gpu, Plan, Tuning, Variant, plan
from mmr5_kernels.fused import Norm
from mmr5_kernels.reference import Parts

LAYOUT = "w4_tiles"  # its name among the operands of a prepared linear
MAX_ROWS = 64
_DEPENDENT_SINCE = (9, 0)  # compute capability with programmatic dependent launch


class Weight(Protocol):
    """A prepared linear, as ``dispatch.Prepared``, whose operands hold :data:`LAYOUT`."""

    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def operands(self) -> Mapping[str, Parts]: ...
    @property
    def bias(self) -> Tensor | None: ...


class Arguments(ctypes.Structure):
    """The structure of this name in the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "zeros")),
        *((name, ctypes.c_void_p) for name in ("norm", "bias", "residual", "y")),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "half", "units", "rows", "swiglu")),
        ("eps", ctypes.c_float),
    ]


def w4_linear(
    x: Tensor,
    weight: Weight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    dependent: bool = True,
    tuning: Tuning = DEFAULT,
) -> Tensor:
    """``fused_linear`` for an int4 weight [N, K] in groups of 128, on a CUDA device.

    x: [M, K] bf16, M at most 64, contiguous; residual: [M, N] bf16. Returns [M, N] bf16, or
    [M, N/2] with ``swiglu``. The result of a row is the same whatever M is. ``dependent`` lets the
    kernel start before the one ahead of it has ended (compute capability 9.0 and up); the result
    does not depend on it.
    Raises ``ValueError`` for other inputs, and what :mod:`nvrtc` and :mod:`launch` raise.
    """
    if not x.is_cuda:
        raise ValueError(f"the CUDA W4 kernel takes tensors on a GPU, not on {x.device}.")
    y = output(x, weight, norm, residual, swiglu)
    if not x.shape[0]:
        return y
    device = x.device.index
    gpu, capability = _gpu(device)
    zeros = "zeros" in weight.operands[LAYOUT]
    planned = plan(x.shape[0], weight.n, weight.k, zeros, norm is not None, gpu, tuning)
    _kernel(planned.variant, device).launch(
        planned.grid,
        planned.variant.warps * 32,
        planned.shared_bytes,
        arguments(x, weight, norm, residual, swiglu, y, planned),
        dependent=dependent and capability >= _DEPENDENT_SINCE,
    )
    return y


def output(
    x: Tensor, weight: Weight, norm: Norm | None, residual: Tensor | None, swiglu: bool
) -> Tensor:
    """An uninitialised tensor for the result, once the inputs are known to fit."""
    n, k = weight.n, weight.k
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != k or x.shape[0] > MAX_ROWS:
        raise ValueError(
            f"this linear takes bfloat16 [M <= {MAX_ROWS}, {k}], not {x.dtype} {list(x.shape)}."
        )
    if swiglu and (residual is not None or n % 2):
        raise ValueError(
            f"SwiGLU needs as many gate as up rows and takes no residual; this weight has {n} rows"
            f"{'' if residual is None else ' and there is a residual'}."
        )
    wanted = {
        "x": (x, tuple(x.shape)),
        "residual": (residual, (x.shape[0], n)),
        "norm.weight": (None if norm is None else norm.weight, (k,)),
        "bias": (weight.bias, (n,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        fits = tuple(tensor.shape) == shape and tensor.dtype == x.dtype
        if not fits or tensor.device != x.device or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be bfloat16 {list(shape)}, contiguous, on {x.device}; it is "
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}."
            )
        if name in ("x", "norm.weight") and tensor.data_ptr() % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes; clone() it.")
    return x.new_empty((x.shape[0], n // 2 if swiglu else n))


def arguments(
    x: Tensor,
    weight: Weight,
    norm: Norm | None,
    residual: Tensor | None,
    swiglu: bool,
    y: Tensor,
    planned: Plan,
) -> Arguments:
    """What the kernel is given; the tensors must outlive its launch, as torch's streams see to."""
    parts = weight.operands[LAYOUT]

    def address(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    return Arguments(
        x=address(x),
        codes=address(parts["codes"]),
        scales=address(parts["scales"]),
        zeros=address(parts.get("zeros")),
        norm=address(None if norm is None else norm.weight),
        bias=address(weight.bias),
        residual=address(residual),
        y=address(y),
        m=x.shape[0],
        n=weight.n,
        k=weight.k,
        half=w4_layout.half(weight.n),
        units=planned.units,
        rows=planned.rows,
        swiglu=int(swiglu),
        eps=0.0 if norm is None else norm.eps,
    )


def source() -> str:
    """The text of the kernel, with that of what it includes."""
    folder = resources.files("mmr5_kernels").joinpath("csrc")
    text = folder.joinpath("w4_linear.cu").read_text("utf-8")
    return text.replace('#include "ptx.cuh"', folder.joinpath("ptx.cuh").read_text("utf-8"))


@cache
def _gpu(device: int) -> tuple[Gpu, tuple[int, int]]:
    properties = torch.cuda.get_device_properties(device)
    gpu = Gpu(properties.multi_processor_count, launch.most_shared_bytes(device))
    return gpu, (properties.major, properties.minor)


@cache
def _kernel(variant: Variant, device: int) -> launch.Kernel:
    gpu, capability = _gpu(device)
    made = nvrtc.cubin(source(), capability, variant.defines)
    return launch.Kernel(made, "w4_linear_kernel", device, gpu.shared_bytes)
