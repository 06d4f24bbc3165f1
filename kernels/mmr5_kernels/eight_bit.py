"""A second copy of a weight in 8 bits, for products of many rows.

int4 serves decoding, where reading the weight is the cost. With many rows the arithmetic is, and
data sheets give 8 bits twice the rate of bf16. The copy rounds weights a second time and
activations as well: it is an option, never a default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mmr5_kernels.layout import INT4_PER_WORD, Format
from mmr5_kernels.reference import (
    Parts,
    dequantize,
    quantize_activations_fp8,
    quantize_activations_int8,
)

KINDS = ("int8", "fp8")
_QUANTIZERS: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "int8": quantize_activations_int8,
    "fp8": quantize_activations_fp8,
}
_BLOCK_WEIGHTS = 1 << 24  # at a time, in fp32 with some temporaries: under 500 MB


def eight_bit_copy(
    format: Format | None, tensors: Parts, kind: str, device: torch.device | str = "cpu"
) -> tuple[Format, dict[str, Tensor]]:
    """A linear's stored tensors requantized to W8A8 with one scale per row.

    ``format`` None is a dense ``weight``; ``kind`` is "int8" or "fp8". Codes are the nearest ones
    to the values that the stored tensors stand for; scales are fp32, the largest magnitude of a row
    over 127 or 448. A weight-only int8 weight with a scale per row keeps its codes when ``kind`` is
    "int8". ``bias`` is taken along. Returns the format and its tensors on ``device``, where the
    work is done.
    Raises ``ValueError`` for another kind, and for a weight that is W8A8 already.
    """
    if kind not in KINDS:
        raise ValueError(f"an 8-bit copy is {' or '.join(KINDS)}, not {kind!r}.")
    if format is not None and format.activations:
        raise ValueError(f"a {format.name} weight has 8 bits already; it needs no copy.")
    bias = {"bias": tensors["bias"].to(device)} if "bias" in tensors else {}
    if format is not None and format.weights == kind and format.group_size is None:
        kept = {name: tensors[name].to(device) for name in ("weight", "weight_scale")}
        return Format(kind, activations=kind, scale=format.scale), kept | bias
    quantize = _QUANTIZERS[kind]
    blocks = [quantize(_values(format, block)) for block in _blocks(tensors, device)]
    codes, scales = zip(*blocks, strict=True)
    parts = {"weight": torch.cat(codes), "weight_scale": torch.cat(scales), **bias}
    return Format(kind, activations=kind, scale="fp32"), parts


def _values(format: Format | None, parts: Parts) -> Tensor:
    if format is None:
        return parts["weight"].float()
    return dequantize(format, parts, torch.float32)


def _blocks(tensors: Parts, device: torch.device | str) -> Iterator[dict[str, Tensor]]:
    """The tensors that have a row per output, some rows at a time, on ``device``."""
    parts = {name: part for name, part in tensors.items() if name not in ("bias", "weight_shape")}
    packed = parts.get("weight_packed")
    columns = parts["weight"].shape[1] if packed is None else packed.shape[1] * INT4_PER_WORD
    rows = max(1, _BLOCK_WEIGHTS // columns)
    for blocks in zip(*(part.split(rows) for part in parts.values()), strict=True):
        yield {name: block.to(device) for name, block in zip(parts, blocks, strict=True)}
