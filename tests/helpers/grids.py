"""Random grids of codes, scales and zero points for the tests of layouts."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from mmr5_export.convert import Grid

WHOLE_WORDS = st.integers(1, 5).map(lambda eighths: 8 * eighths)  # as GPTQ and AWQ need them
ANY_ROWS = st.integers(1, 19)


@st.composite
def grids(
    draw: st.DrawFn,
    bits: tuple[int, ...] = (4, 8),
    zeros: tuple[bool, ...] = (False, True),
    rows: st.SearchStrategy[int] = WHOLE_WORDS,
) -> Grid:
    """A grid of any shape with every code and scales of a few bits, which all dtypes hold."""
    width = draw(st.sampled_from(bits))
    height = draw(rows)
    groups, size = draw(st.integers(1, 4)), draw(st.sampled_from((32, 64, 128)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    limit = 1 << (width - 1)

    def codes(*shape: int, low: int = -limit) -> Tensor:
        return torch.randint(low, limit, shape, generator=generator, dtype=torch.int8)

    steps = torch.randint(1, 256, (height, groups), generator=generator)
    scale = (steps / 4096).to(draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))))
    # The lowest zero point has no number in GPTQ v1.
    zero = codes(height, groups, low=1 - limit) if draw(st.sampled_from(zeros)) else None
    return Grid(width, codes(height, groups * size), scale, zero)


def assert_same(found: Grid, expected: Grid) -> None:
    """The same codes, scales as numbers, and zero points, where none and all zero are one."""
    assert found.bits == expected.bits
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale.float(), expected.scale.float())
    zeros = [
        torch.zeros_like(grid.scale, dtype=torch.int8) if grid.zero is None else grid.zero
        for grid in (found, expected)
    ]
    assert torch.equal(*zeros)
