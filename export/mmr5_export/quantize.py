"""Round-to-nearest quantization of one linear's weight: pure functions from tensor to tensors.

A scale is rounded to the dtype it is stored in *before* the codes are computed, so that the codes
are the nearest ones for the scale a kernel will use. Rows are independent of each other and are
worked on in blocks: a whole 7B layer in fp32 with its temporaries would be over a gigabyte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mmr5_kernels.layout import (
    FP8_MAX,
    INT4_MAX,
    INT4_MIN,
    INT8_MAX,
    SCALE_DTYPES,
    Format,
    pack_int4,
)
from mmr5_kernels.reference import dequantize, noise_energy, ratio_db

SCALE_SEARCHES = ("absmax", "mse")
# Steps from zero to the largest magnitude of a group. For int4, 7.5 is half of the 15 steps between
# -8 and 7: the largest positive value is then rounded down by half a step, as far as any other
# value can be off, and every step is 7 % finer than with the 7 that would store it exactly.
_STEPS = {"int4": (INT4_MAX - INT4_MIN) / 2, "int8": float(INT8_MAX), "fp8": FP8_MAX}
_CODE_RANGE = {"int4": (INT4_MIN, INT4_MAX), "int8": (-INT8_MAX, INT8_MAX)}
# What "mse" tries: the whole range, and less of it in steps of 1 % down to 80 %. Clipping the few
# largest values makes every step finer; below 80 % it never pays for weights.
_SHRINK = tuple(1 - percent / 100 for percent in range(21))
# Thread time of a 4736 x 3584 weight to int4, by block: 2**20 0.11, 2**22 0.36, undivided 0.95 s.
_BLOCK_WEIGHTS = 1 << 20


def scale_search(method: str) -> str:
    """How the rounding methods find scales: "rtn" is absmax, as everywhere; "rtn-mse" clips."""
    return "mse" if method == "rtn-mse" else "absmax"


def quantize_linear(
    weight: Tensor, format: Format, scale_search: str = "absmax"
) -> tuple[dict[str, Tensor], float]:
    """Rounds a weight [N, K] (any float dtype, finite) to the nearest codes of ``format``.

    Returns the stored tensors by suffix, as ``format.tensors(N, K)`` lists them, on the device of
    the weight, and how much signal there is per noise, in decibels (infinite when nothing was
    lost). ``scale_search`` is that of :func:`scales_for`, and so are the errors.
    """
    signal = noise = 0.0

    def rounded(rows: Tensor) -> dict[str, Tensor]:
        nonlocal signal, noise
        wide = rows.float()
        part = _encode(wide, format, *_scales(wide, format, scale_search))
        block_signal, block_noise = noise_energy(rows, dequantize(format, part, torch.float32))
        signal, noise = signal + block_signal, noise + block_noise
        return part

    stored = _joined(map(rounded, _blocks(weight)), format, weight)
    return stored, ratio_db(signal, noise)


def scales_for(
    weight: Tensor, format: Format, scale_search: str = "absmax"
) -> tuple[Tensor, Tensor | None]:
    """Scales, and zero points of an asymmetric format, for a weight [N, K] float.

    "absmax" lets the codes reach the largest magnitude of a group (asymmetric: its smallest and
    largest value, and zero). "mse" also tries to reach only 99, 98, ... 80 % of that, and keeps for
    every group what gives the least squared error after rounding.

    Returns scale [N, G] fp32 holding values of the dtype that ``format`` stores, all above zero,
    and zero point [N, G] int8 or None. Raises ``ValueError`` when groups do not divide K and when
    a scale is not finite: the weight is not, or is too large for the scale's dtype.
    """
    found = [_scales(rows.float(), format, scale_search) for rows in _blocks(weight)]
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def encode(
    weight: Tensor, format: Format, scale: Tensor, zero_point: Tensor | None
) -> dict[str, Tensor]:
    """Nearest codes of a weight [N, K] float for given scales, as the tensors that are stored.

    scale: [N, G] fp32, holding values of the dtype that ``format`` stores (``ValueError``
    otherwise: codes would belong to other scales than a kernel sees); zero_point: [N, G] int8, or
    None for a symmetric format.
    """
    if not torch.equal(scale.to(SCALE_DTYPES[format.scale]).float(), scale):
        raise ValueError(f"scales must hold values of {format.scale}; round them to it first.")
    rows = max(1, _BLOCK_WEIGHTS // weight.shape[1])
    scales = scale.split(rows)
    zeros = [None] * len(scales) if zero_point is None else zero_point.split(rows)
    blocks = zip(weight.split(rows), scales, zeros, strict=True)
    parts = (_encode(block.float(), format, scale, zero) for block, scale, zero in blocks)
    return _joined(parts, format, weight)


def _scales(weight: Tensor, format: Format, scale_search: str) -> tuple[Tensor, Tensor | None]:
    if scale_search not in SCALE_SEARCHES:
        raise ValueError(f"scale search {scale_search!r} is none of {', '.join(SCALE_SEARCHES)}.")
    groups = weight.unflatten(1, (format.groups(weight.shape[1]), -1))
    scale, zero = _range(groups, format, 1.0)
    if scale_search == "absmax":
        return scale, zero
    error = _error(groups, format, scale, zero)
    for share in _SHRINK[1:]:
        other, other_zero = _range(groups, format, share)
        other_error = _error(groups, format, other, other_zero)
        better = other_error < error
        scale, error = torch.where(better, other, scale), torch.where(better, other_error, error)
        if zero is not None and other_zero is not None:
            zero = torch.where(better, other_zero, zero)
    return scale, zero


def _range(groups: Tensor, format: Format, share: float) -> tuple[Tensor, Tensor | None]:
    """Scale [N, G], and zero point, with which codes cover ``share`` of the range of each group."""
    if format.symmetric:
        largest = groups.abs().amax(dim=-1) * share
        return _stored_scale(largest / _STEPS[format.weights], format), None
    low = groups.amin(dim=-1).clamp_(max=0) * share
    high = groups.amax(dim=-1).clamp_(min=0) * share
    scale = _stored_scale((high - low) / (INT4_MAX - INT4_MIN), format)
    zero = (INT4_MIN - low / scale).round_().clamp_(INT4_MIN, INT4_MAX)
    return scale, zero.to(torch.int8)


def _stored_scale(scale: Tensor, format: Format) -> Tensor:
    """``scale`` in the values that are stored; 1 where there is nothing to scale.

    A scale below the subnormals of the dtype would be zero; such weights are lost anyway.
    """
    scale = scale.to(SCALE_DTYPES[format.scale]).float()
    if not torch.isfinite(scale).all():
        raise ValueError(
            f"the weight holds NaN, infinite or too large values for {format.scale} scales."
        )
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _codes(groups: Tensor, format: Format, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Nearest codes of groups [N, G, g], as fp32 values."""
    codes = groups / scale.unsqueeze(-1)
    if format.weights == "fp8":
        # Clamped first: a value that rounds to above 448 would become NaN.
        return codes.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    codes.round_()
    if zero is not None:
        codes.add_(zero.unsqueeze(-1))
    return codes.clamp_(*_CODE_RANGE[format.weights])


def _error(groups: Tensor, format: Format, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Squared error [N, G] of the nearest codes."""
    codes = _codes(groups, format, scale, zero)
    if zero is not None:
        codes.sub_(zero.unsqueeze(-1))
    return codes.mul_(scale.unsqueeze(-1)).sub_(groups).square_().sum(dim=-1)


def _encode(
    weight: Tensor, format: Format, scale: Tensor, zero: Tensor | None
) -> dict[str, Tensor]:
    groups = weight.unflatten(1, (format.groups(weight.shape[1]), -1))
    codes = _codes(groups, format, scale, zero).flatten(1)
    part = {"weight_scale": scale.to(SCALE_DTYPES[format.scale])}
    if zero is not None:
        part["weight_zero_point"] = zero
    if format.weights == "int4":
        return {"weight_packed": pack_int4(codes.to(torch.int8)), **part}
    dtype = torch.int8 if format.weights == "int8" else torch.float8_e4m3fn
    return {"weight": codes.to(dtype), **part}


def _blocks(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.split(max(1, _BLOCK_WEIGHTS // weight.shape[1]))


def _joined(
    parts: Iterable[dict[str, Tensor]], format: Format, weight: Tensor
) -> dict[str, Tensor]:
    """Parts of blocks of rows as those of the whole, each block let go when it is copied."""
    stored: dict[str, Tensor] = {}
    row = 0
    for part in parts:
        end = row + len(part["weight_scale"])
        for suffix, block in part.items():
            if suffix not in stored:
                stored[suffix] = block.new_empty((len(weight), *block.shape[1:]))
            stored[suffix][row:end] = block
        row = end
    if format.weights == "int4":
        stored["weight_shape"] = torch.tensor(weight.shape, device=weight.device)
    return stored
