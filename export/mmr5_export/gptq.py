"""GPTQ of one linear: the solver is llmcompressor's, scales, ordering and packing are ours.

Memory decides how the solver is driven. Its Hessian is K x K fp32, 1.4 GB for the widest linear of
a 7B; the solver's own activation ordering makes two more of them, and LAPACK copies a row-major
one at every step. So the columns are ordered here, block by block into the one working copy, which
is handed over column-major (it is symmetric) and factorized in place. On a CPU the caller's Hessian
and one more are then all there is, besides a few tensors of the weight's size (measured); what a
GPU's solver takes for itself is not known, and the estimate of an export counts one more there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import frexp, isfinite, nan
from typing import Any

import torch
from torch import Tensor

from mmr5_export.finite import is_finite, require_finite
from mmr5_export.quantize import encode, scales_for
from mmr5_kernels.layout import INT8_MAX, Format
from mmr5_kernels.reference import dequantize
from mmr5_runtime.types import CheckpointError, ExportError

DAMP = 0.01
MAX_DAMP = 1.0
_BLOCK = 1 << 22  # values of a temporary: 16 MB in fp32
_LOG_SWITCH = "LLM_COMPRESSOR_LOG_DISABLED"
_TRITON_SWITCH = "LLMCOMPRESSOR_DISABLE_GPTQ_TRITON"


@dataclass(frozen=True)
class GptqStats:
    """``error`` is tr(dW H dW^T) / tr(W H W^T): what the quantized outputs lost of their energy.

    ``damp`` was added to the diagonal of H, as a fraction of its mean.
    """

    error: float
    damp: float


def gptq(
    weight: Tensor,
    hessian: Tensor,
    format: Format,
    *,
    name: str,
    damp: float = DAMP,
    static_order: bool = True,
    scale_search: str | None = None,
) -> tuple[dict[str, Tensor], GptqStats]:
    """Quantizes column by column, each taking up the error of those before (arXiv 2210.17323).

    weight: [N, K] float; hessian: [K, K] fp32 on the same device, the sum of x x^T over inputs in
    any positive scaling, left as it is; format: int4 or int8. Scales are found before any column
    is changed, by ``scale_search`` ("absmax" or "mse", None for the better one at this width);
    ``static_order`` takes the columns with large inputs first, which costs nothing later. Returns
    the stored tensors and statistics.

    Inputs that were always zero tell nothing about their columns: those are rounded to nearest,
    which leaves the output over the inputs seen as it is and serves inputs that were not.

    A Hessian that cannot be factorized is tried again with ten times the ``damp``, up to 1. Raises
    :class:`CheckpointError` naming the linear when that fails or when the weight or the Hessian is
    not finite or without any input, :class:`ExportError` when llmcompressor is missing or returns
    what is no code, ``ValueError`` for another format, other shapes or a damp outside (0, 1].
    """
    _check(weight, hessian, format, damp)
    require_finite_problem(name, weight, hessian)
    source = weight.float()
    # At 8 bits a narrower range gains nothing and clips: 1 to 4 % more output error on random data.
    search = scale_search or ("mse" if format.weights == "int4" else "absmax")
    scale, zero_point = scales_for(source, format, search)
    order = _column_order(name, hessian, static_order)
    used = damp
    while True:
        restored = _solve(source, hessian, format, scale, zero_point, order, used)
        if restored is not None:
            break
        if used >= MAX_DAMP:
            raise CheckpointError(
                f"the Hessian of {name} cannot be factorized even with its whole mean added to its "
                "diagonal; calibrate with more samples, or leave this linear to --method rtn."
            )
        used = min(used * 10, MAX_DAMP)
    if format.weights == "int8":
        # The solver's codes go down to -128, which the format leaves out.
        lowest = scale * -INT8_MAX
        restored = torch.maximum(restored, _by_column(lowest, restored.shape[1]), out=restored)
    parts = encode(restored, format, scale, zero_point)
    approximation = dequantize(format, parts, torch.float32)
    if not torch.equal(approximation, restored):
        raise ExportError(
            f"llmcompressor's result for {name} is not made of codes times scales; install the "
            "version this project pins: pip install 'mmr5-runtime[export]'."
        )
    del restored
    return parts, GptqStats(output_error(source, approximation, hessian), used)


def rtn_error(weight: Tensor, hessian: Tensor, parts: dict[str, Tensor], format: Format) -> float:
    """The error of :class:`GptqStats` for stored tensors from anywhere, round to nearest first.

    weight: [N, K] float; hessian: [K, K] fp32; ``parts`` as ``format`` stores the weight.
    """
    return output_error(weight, dequantize(format, parts, torch.float32), hessian)


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T) / tr(W H W^T), 0 where there is no output to lose, NaN where a sum overflows.

    weight, approximation: [N, K] float; hessian: [K, K] fp32. Rows are worked on in blocks, whose
    sums are added in fp64.
    """
    noise = signal = 0.0
    rows = max(1, _BLOCK // weight.shape[1])
    for wide, close in zip(weight.split(rows), approximation.split(rows), strict=True):
        wide = wide.float()
        difference = close.float() - wide
        noise += quadratic_form(difference, hessian)
        signal += quadratic_form(wide, hessian)
    if not (isfinite(noise) and isfinite(signal)):
        return nan
    return max(noise, 0.0) / signal if signal > 0 else 0.0


def quadratic_form(rows: Tensor, hessian: Tensor) -> float:
    """tr(R H R^T): rows [n, K] fp32, hessian [K, K] fp32; row sums in fp32, their sum in fp64."""
    return float(((rows @ hessian) * rows).sum(dim=1).double().sum())


def _check(weight: Tensor, hessian: Tensor, format: Format, damp: float) -> None:
    if format.weights not in ("int4", "int8"):
        raise ValueError(f"GPTQ is for int4 and int8 weights, not {format.weights}.")
    columns = weight.shape[1]
    if hessian.shape != (columns, columns) or hessian.dtype != torch.float32:
        raise ValueError(
            f"a weight {list(weight.shape)} needs a float32 Hessian [{columns}, {columns}], not "
            f"{hessian.dtype} {list(hessian.shape)}."
        )
    if not 0 < damp <= MAX_DAMP:
        raise ValueError(f"damp is a fraction above 0 and up to {MAX_DAMP}, not {damp}.")


def require_finite_problem(name: str, weight: Tensor, hessian: Tensor) -> None:
    """Raises :class:`CheckpointError` naming a linear whose weight or Hessian is not finite."""
    require_finite(f"the weight of {name}", weight)
    remedy = "calibrate in bf16 or float32 and without the sample that overflows"
    require_finite(f"the Hessian of {name}", hessian, remedy)


def _column_order(name: str, hessian: Tensor, static_order: bool) -> Tensor:
    """Order in which columns are quantized, [K] int64; checks the diagonal on the way."""
    diagonal = hessian.diagonal()
    if not bool((diagonal > 0).any()) or bool((diagonal < 0).any()):
        raise CheckpointError(
            f"the inputs of {name} were zero for every calibration token (or its Hessian is no "
            "sum of squares); calibrate with other samples."
        )
    if not static_order:
        return torch.arange(len(diagonal), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def _solve(
    source: Tensor,
    hessian: Tensor,
    format: Format,
    scale: Tensor,
    zero_point: Tensor | None,
    order: Tensor,
    damp: float,
) -> Tensor | None:
    """The dequantized result [N, K] fp32; None when the Hessian could not be factorized."""
    arguments, quantize_weight = _library()
    columns = source.shape[1]
    # Scales of single columns, because a group's columns are apart once they are reordered.
    per_column = _by_column(scale, columns)[:, order]
    zero = torch.zeros((), device=source.device)
    if zero_point is not None:
        zero = _by_column(zero_point, columns)[:, order]
    args = arguments(
        num_bits=4 if format.weights == "int4" else 8,
        type="int",
        symmetric=format.symmetric,
        strategy="group",
        group_size=1,
    )
    try:
        # Its Triton kernel has never run in a test of ours, and rounds in an order of its own.
        with _environment(_TRITON_SWITCH, "1"):
            quantized, _, fell_back = quantize_weight(
                source[:, order].unsqueeze(0),
                _working_copy(hessian, order).mT.unsqueeze(0),
                per_column.unsqueeze(0),
                zero.unsqueeze(0),
                None,
                args,
                percdamp=damp,
            )
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, not annotated
        return None
    if bool(fell_back.any()) or not is_finite(quantized):
        return None
    return torch.empty_like(source).index_copy_(1, order, quantized[0])


def _working_copy(hessian: Tensor, order: Tensor) -> Tensor:
    """The Hessian with both axes in ``order``, scaled to a mean diagonal near 1.

    The scale is a power of two, so that it changes no bit of the result. Inputs that were always
    zero get the mean diagonal: the solver would otherwise zero their columns and count them as 1,
    whatever the scale of the others, when it derives the damping from the mean.
    """
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = float(diagonal[live].double().mean())
    factor = 2.0 ** -frexp(mean)[1]
    copy = torch.empty_like(hessian, memory_format=torch.contiguous_format)
    start = 0
    for rows in order.split(max(1, _BLOCK // len(order))):
        torch.mul(hessian[rows][:, order], factor, out=copy[start : start + len(rows)])
        start += len(rows)
    copy.diagonal().masked_fill_(~live[order], mean * factor)
    return copy


def _by_column(values: Tensor, columns: int) -> Tensor:
    """[N, G] of each group -> [N, K] of each column."""
    return values.repeat_interleave(columns // values.shape[1], dim=1)


def _library() -> tuple[Any, Any]:
    """llmcompressor's argument class and solver, imported on first use: it takes 8 seconds."""
    try:
        with _without_its_log():
            from compressed_tensors.quantization import QuantizationArgs
            from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    except ImportError as error:
        raise ExportError(
            f"GPTQ needs llmcompressor ({error}); run pip install 'mmr5-runtime[export]'."
        ) from error
    return QuantizationArgs, quantize_weight


@contextmanager
def _without_its_log() -> Iterator[None]:
    """Keeps llmcompressor's import from taking over the loguru log of the whole process.

    It would drop every handler there is and write to stdout, which belongs to our own output.
    """
    if "llmcompressor" in sys.modules:
        yield
        return
    with _environment(_LOG_SWITCH, "true"):
        yield


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable inside the block; afterwards it is what it was."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
