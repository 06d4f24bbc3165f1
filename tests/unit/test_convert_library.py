"""Layouts are what other packages pack: compressed-tensors, whose format it is, and auto-round.

auto-round writes the layouts of GPTQ and AutoAWQ for the readers of those, whose own packages are
no longer developed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.grids import ANY_ROWS, grids
from mmr5_export.convert import Grid, from_awq, to_awq, to_engine, to_gptq, to_pack_quantized
from mmr5_kernels.layout import Format

_REASON = "llmcompressor, which brings both packages, comes with the export extra"
library = pytest.importorskip("compressed_tensors.compressors.pack_quantized", reason=_REASON)
converters = pytest.importorskip(
    "compressed_tensors.entrypoints.convert.converters", reason=_REASON
)

FULL_WORDS = st.integers(1, 3).map(lambda words: 32 * words)  # as auto-round takes them


@given(grids(rows=ANY_ROWS))
def test_pack_quantized_is_what_compressed_tensors_packs(grid: Grid) -> None:
    tensors = to_pack_quantized(grid)
    assert torch.equal(tensors["weight_packed"], library.pack_to_int32(grid.codes, grid.bits))
    shape = torch.Size(tensors["weight_shape"].tolist())
    codes = library.unpack_from_int32(tensors["weight_packed"], grid.bits, shape)
    assert torch.equal(codes, grid.codes)
    if grid.zero is not None:
        packed = library.pack_to_int32(grid.zero, grid.bits, packed_dim=0)
        assert torch.equal(tensors["weight_zero_point"], packed)


@given(grids(bits=(4,)))
def test_an_engines_int4_words_are_compressed_tensors(grid: Grid) -> None:
    format = Format("int4", grid.group_size, grid.zero is None, scale="fp32")
    engine, packed = to_engine(grid, format), to_pack_quantized(grid)
    assert torch.equal(engine["weight_packed"], packed["weight_packed"])
    assert torch.equal(engine["weight_shape"], packed["weight_shape"])


@given(grids(bits=(4,)))
def test_awq_converts_as_compressed_tensors_converts_it(grid: Grid) -> None:
    written = to_awq(grid)
    theirs = converters.AutoAWQConverter().process(
        {f"x.{key}": part for key, part in written.items()}
    )
    ours = to_pack_quantized(from_awq(written))
    assert set(theirs) == {f"x.{key}" for key in ours}
    assert all(torch.equal(theirs[f"x.{key}"], part) for key, part in ours.items())


def unpacked(grid: Grid) -> tuple[nn.Linear, Tensor, Tensor | int]:
    """A linear with the weight, scales [N, G] fp32, and zero points from 0 up as a packer wants."""
    scale, middle = grid.scale.float(), 1 << (grid.bits - 1)
    zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.float()
    weight = (grid.codes - zero.repeat_interleave(grid.group_size, 1)) * scale.repeat_interleave(
        grid.group_size, 1
    )
    linear = nn.Linear(grid.codes.shape[1], grid.codes.shape[0], bias=False)
    linear.weight.data = weight
    return linear, scale, middle if grid.zero is None else zero + middle


@pytest.fixture(scope="module")
def gptq() -> Any:
    return pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp", reason=_REASON)


@pytest.fixture(scope="module")
def awq() -> Any:
    return pytest.importorskip("auto_round.export.export_to_awq.utils", reason=_REASON)


@given(grid=grids(rows=FULL_WORDS))
def test_gptq_is_what_auto_round_packs(gptq: Any, grid: Grid) -> None:
    linear, scale, zero = unpacked(grid)
    rows, columns = grid.codes.shape
    packed = gptq.QuantLinear(grid.bits, grid.group_size, columns, rows, bias=False)
    packed.pack(linear, scale, zero, device="cpu")
    written = to_gptq(grid)
    for name in ("qweight", "qzeros", "scales"):
        assert torch.equal(written[name], getattr(packed, name)), name


@given(grid=grids(bits=(4,), rows=FULL_WORDS))
def test_awq_is_what_auto_round_packs(awq: Any, grid: Grid) -> None:
    linear, scale, zero = unpacked(grid)
    zeros = zero.T.contiguous() if isinstance(zero, Tensor) else zero
    packed = awq.WQLinear_GEMM.from_linear(
        linear, 4, grid.group_size, scales=scale.T.contiguous(), zeros=zeros, device="cpu"
    )
    written = to_awq(grid)
    for name in ("qweight", "qzeros", "scales"):
        assert torch.equal(written[name], getattr(packed, name)), name
