"""Scales of input columns that make a weight, or its activations, easier to quantize.

Every linear computes x W^T = (x / s) (s W)^T for any positive s [K]. SmoothQuant chooses s so that
outliers of x move into W; AWQ so that the columns of W with large inputs are rounded finely. The
division is taken out of whatever produces x: the weight of a norm, or the rows of a linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmr5_export.gptq import quadratic_form
from mmr5_export.quantize import encode, scales_for
from mmr5_kernels.layout import SCALE_DTYPES, Format
from mmr5_kernels.reference import dequantize

GRID = 20
# Columns of a weight below this fraction of the largest count as so large: a column of zeros has
# no range to share, and its activations may shrink as far as those of the least other column.
_LEAST_RANGE = 1e-5
# Scales of one linear further apart than this would drive a bf16 norm to its ends.
_LEAST_SCALE = 1e-4
# Of a group's range. The coarse ones are for each of many candidates.
_SHARES = tuple(1 - percent / 100 for percent in range(21))
_COARSE_SHARES = _SHARES[::5]
_BLOCK = 1 << 22  # values of a temporary: 16 MB in fp32


def smoothquant_scales(absmax: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """max|x|^alpha / max|w|^(1 - alpha) of every column (SmoothQuant, arXiv 2211.10438).

    absmax: [K], the largest |x| seen; weights: [N_i, K] float of the linears that read x. Returns
    [K] fp32, positive; 1 for inputs that were always zero. A common factor has no effect, because
    activations are quantized by token and weights by row.
    Raises ``ValueError`` unless 0 <= alpha <= 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha of SmoothQuant lies in 0..1, not {alpha}.")
    ranges = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)
    if not bool((ranges > 0).any()):
        return torch.ones_like(ranges)
    ranges = ranges.clamp(min=float(ranges.max()) * _LEAST_RANGE)
    live = absmax > 0
    scales = absmax.float().clamp(min=_tiny()).pow(alpha) / ranges.pow(1 - alpha)
    return torch.where(live, scales, torch.ones_like(scales))


def awq_scales(
    hessian: Tensor,
    mean_abs: Tensor,
    weights: Sequence[Tensor],
    format: Format,
    grid: int = GRID,
    clip: bool = True,
) -> tuple[Tensor, float]:
    """The scales of least output error on a grid (AWQ, arXiv 2306.00978).

    Candidates are mean|x|^r / mean|w|^(1 - r), where mean|w| is relative to the largest weight of
    a group and r runs over ``grid`` - 1 points of 0..1; and no scaling at all, so that the result
    is never worse than none. The error is the exact one over all inputs, through H, where the
    original evaluates a few samples.

    hessian: [K, K] fp32, the sum of x x^T; mean_abs: [K], the mean |x|; weights: [N_i, K] float of
    the linears that read x, to be rounded to nearest as ``format``: with :func:`clipped_scales`
    (``clip``, the search takes coarse steps of them) or over their whole range. The original clips
    only afterwards; at once took another 1 to 6 % off the error of the embedded checkpoint. Against
    llmcompressor's modifier the search is tested without clipping, which that does not do either:
    within 2 % of its output error; what an export does, with clipping, must not be above the two.

    Returns the scales [K] fp32, positive, with 1 for inputs that were always zero, and
    tr(dW H dW^T) / tr(W H W^T) over all the weights together.

    Raises ``ValueError`` for a grid of fewer than 3.
    """
    if grid < 3:
        raise ValueError(f"the grid of AWQ needs 3 points or more, not {grid}.")
    signal = sum(quadratic_form(rows, hessian) for rows in _blocks(weights))
    best = torch.ones_like(mean_abs, dtype=torch.float32)
    least = _noise(hessian, weights, best, format, clip)
    inputs = mean_abs.float()
    importance = _relative_magnitudes(weights, format)
    for step in range(grid - 1):
        scales = _candidate(inputs, importance, step / (grid - 2))
        noise = _noise(hessian, weights, scales, format, clip)
        if noise < least:
            best, least = scales, noise
    return best, max(least, 0.0) / signal if signal > 0 else 0.0


def clipped_scales(
    weight: Tensor, format: Format, importance: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Scales, and zero points, that round to the least error weighted by input: AWQ's second step.

    weight: [N, K] float, scaled already; importance: [K], the mean square of each input (any
    factor; the diagonal of the Hessian). Every group may give up to 20 % of its range for finer
    steps. A search without weights clips the very columns that AWQ made large: on the down
    projections of the embedded checkpoint it raised the output error of int4 after AWQ by half,
    where this one took off a quarter. Returns scale [N, G] fp32 and zero point [N, G] int8 or None,
    for ``encode``.
    """
    found = [_clipped(rows, format, importance, _SHARES) for rows in _blocks([weight])]
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def fold_into_norm(norm: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Divides the weight of a norm by ``scales``; says what it was really divided by.

    norm: [K] bf16; scales: [K], positive. Returns the new weight [K] in the dtype of ``norm`` and
    the effective scales [K] fp32, old / new of the *rounded* weight, for the linears that follow:
    what the norm lost by rounding, they make up for. A weight that is zero, or would become zero or
    infinite, stays, with scale 1.
    """
    wide = norm.float()
    divided = (wide / scales.float()).to(norm.dtype)
    kept = (divided == 0) | ~torch.isfinite(divided)
    new = torch.where(kept, norm, divided)
    effective = torch.where(kept, torch.ones_like(wide), wide / new.float())
    return new, effective


def fold_into_rows(weight: Tensor, scales: Tensor) -> Tensor:
    """Divides what a linear gives out by ``scales``: weight [N, K] float -> [N, K] fp32.

    scales: [N], positive. Rows quantized afterwards lose no more than before, their codes being the
    same up to the rounding of scales; rows stored as bf16 are rounded once more. A bias [N] has to
    be divided as well. For up -> down, and for v -> o when there are as many kv heads as heads.
    """
    return weight.float() / scales.float().unsqueeze(-1)


def transform_hessian(hessian: Tensor, scales: Tensor) -> Tensor:
    """The Hessian of inputs x / s: H / (s s^T). hessian: [K, K] fp32; scales: [K] -> [K, K]."""
    return (hessian / scales.unsqueeze(-1)).div_(scales)


def _candidate(inputs: Tensor, importance: Tensor, ratio: float) -> Tensor:
    live = inputs > 0
    scales = inputs.clamp(min=_tiny()).pow(ratio) / (importance.pow(1 - ratio) + _LEAST_SCALE)
    low, high = scales[live].aminmax() if bool(live.any()) else (scales.min(), scales.max())
    scales = (scales / (low * high).sqrt()).clamp(_LEAST_SCALE, 1 / _LEAST_SCALE)
    return torch.where(live, scales, torch.ones_like(scales))


def _relative_magnitudes(weights: Sequence[Tensor], format: Format) -> Tensor:
    """Mean over all rows of |w| as a fraction of the largest in its group: [K] fp32."""
    total = torch.zeros(weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    for rows in _blocks(weights):
        groups = rows.abs().unflatten(1, (format.groups(rows.shape[1]), -1))
        largest = groups.amax(dim=-1, keepdim=True).clamp(min=_tiny())
        total += (groups / largest).flatten(1).double().sum(dim=0)
    return (total / sum(weight.shape[0] for weight in weights)).float()


def _noise(
    hessian: Tensor, weights: Sequence[Tensor], scales: Tensor, format: Format, clip: bool
) -> float:
    """tr(dW H dW^T) of weights that are scaled, rounded to nearest and scaled back."""
    importance = hessian.diagonal() / scales.square()
    shares = _COARSE_SHARES if clip else (1.0,)
    noise = 0.0
    for rows in _blocks(weights):
        scaled = rows * scales
        parts = encode(scaled, format, *_clipped(scaled, format, importance, shares))
        restored = dequantize(format, parts, torch.float32).div_(scales)
        noise += quadratic_form(restored.sub_(rows), hessian)
    return noise


def _clipped(
    rows: Tensor, format: Format, importance: Tensor, shares: Sequence[float]
) -> tuple[Tensor, Tensor | None]:
    # A zero point is the place of zero in the range, which all of its shares have in common.
    whole, zero_point = scales_for(rows, format)
    best, least = whole, torch.full_like(whole, torch.inf)
    for share in shares:
        scale = (whole * share).to(SCALE_DTYPES[format.scale]).float()
        scale = torch.where(scale > 0, scale, whole)
        error = dequantize(format, encode(rows, format, scale, zero_point), torch.float32)
        error = error.sub_(rows).square_().mul_(importance)
        error = error.unflatten(1, (whole.shape[1], -1)).sum(dim=-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best, zero_point


def _blocks(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """Blocks of rows in fp32: whatever K, a product with H stays at 16 MB."""
    rows = max(1, _BLOCK // weights[0].shape[1])
    return (block.float() for weight in weights for block in weight.split(rows))


def _tiny() -> float:
    return float(torch.finfo(torch.float32).tiny)
