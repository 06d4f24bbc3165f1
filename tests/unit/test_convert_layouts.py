"""Every layout says what its documentation says: decoded here value by value, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from helpers.grids import assert_same
from mmr5_export.convert import (
    Grid,
    engine_group_size,
    exact_scale,
    from_awq,
    from_engine,
    from_gptq,
    from_modelopt,
    from_pack_quantized,
    to_awq,
    to_engine,
    to_gptq,
    to_matmul_nbits,
    to_modelopt,
    to_pack_quantized,
)
from mmr5_kernels.layout import FP8, Format

ROWS, COLUMNS, GROUPS = 16, 64, 2
Values = list[list[float]]


def a_grid(bits: int = 4, zeros: bool = False, rows: int = ROWS) -> Grid:
    generator = torch.Generator().manual_seed(bits + zeros)
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (rows, COLUMNS), generator=generator).to(torch.int8)
    scale = torch.randint(1, 256, (rows, GROUPS), generator=generator).to(torch.bfloat16) / 1024
    zero = torch.randint(1 - limit, limit, (rows, GROUPS), generator=generator).to(torch.int8)
    return Grid(bits, codes, scale, zero if zeros else None)


def dense(grid: Grid) -> Values:
    """The weight by its definition; a code times a scale of 8 bits is exact in a float."""
    size = COLUMNS // GROUPS
    scale: Values = grid.scale.tolist()
    zero = [[0] * GROUPS] * len(grid.codes) if grid.zero is None else grid.zero.tolist()
    return [
        [(code - zero[n][k // size]) * scale[n][k // size] for k, code in enumerate(row)]
        for n, row in enumerate(grid.codes.tolist())
    ]


def bits_of(word: int, place: int, bits: int) -> int:
    """Number ``place`` of ``bits`` bits each, counted from the lowest bit of a word."""
    return (word >> (place * bits)) % (1 << bits)


def decode_pack_quantized(tensors: Mapping[str, Tensor], bits: int, zeros: bool) -> Values:
    # Offset binary; weights are packed along the columns, zero points along the rows.
    per_word, middle = 32 // bits, 1 << (bits - 1)
    words: list[list[int]] = tensors["weight_packed"].tolist()
    scale: Values = tensors["weight_scale"].tolist()
    packed = tensors["weight_zero_point"].tolist() if zeros else []
    rows, columns = tensors["weight_shape"].tolist()
    size: int = columns // len(scale[0])

    def value(n: int, k: int) -> float:
        zero = bits_of(packed[n // per_word][k // size], n % per_word, bits) if zeros else middle
        return (bits_of(words[n][k // per_word], k % per_word, bits) - zero) * scale[n][k // size]

    return [[value(n, k) for k in range(columns)] for n in range(rows)]


def decode_gptq(tensors: Mapping[str, Tensor], bits: int, shift: int) -> Values:
    # Unsigned codes packed along the inputs; zero points along the outputs, in v1 less one.
    per_word = 32 // bits
    words, zeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales, index = tensors["scales"].tolist(), tensors["g_idx"].tolist()

    def value(n: int, k: int) -> float:
        code = bits_of(words[k // per_word][n], k % per_word, bits)
        zero = bits_of(zeros[index[k]][n // per_word], n % per_word, bits) + shift
        return (code - zero) * float(scales[index[k]][n])

    return [[value(n, k) for k in range(len(index))] for n in range(len(scales[0]))]


def decode_awq(tensors: Mapping[str, Tensor]) -> Values:
    # Nibbles of a word, lowest first, hold outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
    place = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
    words, zeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales = tensors["scales"].tolist()
    size = len(words) // len(scales)

    def value(n: int, k: int) -> float:
        code = bits_of(words[k][n // 8], place[n % 8], 4)
        zero = bits_of(zeros[k // size][n // 8], place[n % 8], 4)
        return (code - zero) * float(scales[k // size][n])

    return [[value(n, k) for k in range(len(words))] for n in range(len(scales[0]))]


def decode_modelopt(tensors: Mapping[str, Tensor]) -> Values:
    # Two output rows in a byte, the even one in the low nibble, in two's complement.
    packed, scale = tensors["weight"].tolist(), tensors["weight_scale"].tolist()
    size = len(packed[0]) // len(scale[0])

    def value(n: int, k: int) -> float:
        nibble = bits_of(packed[n // 2][k], n % 2, 4)
        return (nibble - 16 * (nibble > 7)) * float(scale[n][k // size])

    return [[value(n, k) for k in range(len(packed[0]))] for n in range(len(scale))]


def decode_matmul_nbits(tensors: Mapping[str, Tensor], bits: int, zeros: bool) -> Values:
    # Blocks of bytes, the first column of a byte in its low bits; so are zero points along groups.
    per_byte, middle = 8 // bits, 1 << (bits - 1)
    blocks, scales = tensors["B"].tolist(), tensors["scales"].tolist()
    packed = tensors["zero_points"].tolist() if zeros else []

    def value(n: int, g: int, k: int) -> float:
        code = bits_of(blocks[n][g][k // per_byte], k % per_byte, bits)
        zero = bits_of(packed[n][g // per_byte], g % per_byte, bits) if zeros else middle
        return (code - zero) * float(scales[n][g])

    size = len(blocks[0][0]) * per_byte
    groups = range(len(scales[0]))
    return [[value(n, g, k) for g in groups for k in range(size)] for n in range(len(blocks))]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_layouts_of_both_widths_decode_to_the_weight(bits: int, zeros: bool) -> None:
    grid = a_grid(bits, zeros)
    assert decode_pack_quantized(to_pack_quantized(grid), bits, zeros) == dense(grid)
    assert decode_matmul_nbits(to_matmul_nbits(grid), bits, zeros) == dense(grid)
    assert decode_gptq(to_gptq(grid), bits, 1) == dense(grid)
    assert decode_gptq(to_gptq(grid, zero_shift=0), bits, 0) == dense(grid)


@pytest.mark.parametrize("zeros", [False, True])
def test_awq_decodes_to_the_weight(zeros: bool) -> None:
    assert decode_awq(to_awq(a_grid(zeros=zeros))) == dense(a_grid(zeros=zeros))


def test_modelopt_decodes_to_the_weight() -> None:
    written = to_modelopt(a_grid(), pre_quant_scale=True)
    assert decode_modelopt(written) == dense(a_grid())
    assert written["pre_quant_scale"].tolist() == [1.0] * COLUMNS
    assert "pre_quant_scale" not in to_modelopt(a_grid())


def test_dtypes_are_the_documented_ones() -> None:
    grid = a_grid(zeros=True)
    assert {key: part.dtype for key, part in to_gptq(grid).items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }
    assert to_awq(grid)["scales"].dtype == torch.float16
    assert to_pack_quantized(grid)["weight_scale"].dtype == torch.bfloat16
    assert to_modelopt(a_grid())["weight_scale"].dtype == torch.float32
    assert to_matmul_nbits(grid, torch.float16)["scales"].dtype == torch.float16


def test_symmetric_gptq_stores_seven_for_every_zero_point() -> None:
    # What AutoGPTQ writes for symmetric weights: 8, less one.
    assert {word & 0xFFFFFFFF for word in to_gptq(a_grid())["qzeros"].flatten().tolist()} == {
        0x77777777
    }


def test_act_order_is_refused() -> None:
    tensors = to_gptq(a_grid())
    shuffled = tensors["g_idx"].flip(0)
    with pytest.raises(ValueError, match="act-order"):
        from_gptq({**tensors, "g_idx": shuffled}, 4)
    assert torch.equal(
        from_gptq({key: part for key, part in tensors.items() if key != "g_idx"}, 4).codes,
        a_grid().codes,
    )


def test_a_zero_point_that_wraps_in_gptq_v1_is_refused() -> None:
    grid = a_grid(zeros=True)
    assert grid.zero is not None
    grid.zero[3, 1] = -8
    with pytest.raises(ValueError, match="gptq_v2"):
        to_gptq(grid)
    assert_same(from_gptq(to_gptq(grid, zero_shift=0), 4, zero_shift=0), grid)
    grid.zero[3, 1] = 7  # 15 of 15, and 16 when read as v1
    with pytest.raises(ValueError, match="zero point is 16"):
        from_gptq(to_gptq(grid, zero_shift=0), 4)


def test_an_input_that_is_scaled_is_refused() -> None:
    tensors = to_modelopt(a_grid(), pre_quant_scale=True)
    tensors["pre_quant_scale"][5] = 1.5
    with pytest.raises(ValueError, match="pre_quant_scale"):
        from_modelopt(tensors)


@pytest.mark.parametrize(
    ("value", "becomes"), [(1e-9, "becomes 0 as"), (1e9, "becomes inf"), (2.0**-20, None)]
)
def test_a_scale_that_fp16_does_not_hold_is_refused(value: float, becomes: str | None) -> None:
    scale = torch.tensor([[0.5, value]], dtype=torch.bfloat16)
    if becomes is None:
        assert torch.equal(exact_scale(scale, torch.float16).float(), scale.float())
        return
    with pytest.raises(ValueError, match=becomes):
        exact_scale(scale, torch.float16)


def test_a_scale_of_fp16_with_too_many_bits_for_bf16_is_refused() -> None:
    scale = torch.tensor([[1 + 2**-10]], dtype=torch.float16)
    with pytest.raises(ValueError, match="1.00097656 .float16. becomes 1 as bfloat16"):
        exact_scale(scale, torch.bfloat16)


@pytest.mark.parametrize(
    ("grid", "format", "reason"),
    [
        (a_grid(zeros=True), Format("int4", 32), "no zero points"),
        (a_grid(8), Format("int4", 32), "8-bit groups of 32 columns are no w4a16-g32 weight"),
        (a_grid(), Format("int4", 64), "4-bit groups of 32 columns are no w4a16-g64"),
        (a_grid(), Format("int4", 128), "64 columns are no multiple"),
        (a_grid(8), FP8, "8-bit groups"),
    ],
)
def test_a_format_that_does_not_hold_the_grid_is_refused(
    grid: Grid, format: Format, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        to_engine(grid, format)


def test_what_is_no_grid_is_refused() -> None:
    grid = a_grid()
    for bits, codes, scale, zero in (
        (3, grid.codes, grid.scale, None),
        (4, grid.codes.int(), grid.scale, None),
        (4, grid.codes + 1, grid.scale, None),
        (4, grid.codes, grid.scale[:, :1].expand(-1, 3), None),
        (4, grid.codes, grid.scale[1:], None),
        (4, grid.codes, grid.scale, torch.zeros(ROWS, 1, dtype=torch.int8)),
        (4, grid.codes, grid.scale, torch.full((ROWS, GROUPS), 8, dtype=torch.int8)),
    ):
        with pytest.raises(ValueError):
            Grid(bits, codes, scale, zero)


def test_layouts_of_four_bits_refuse_eight() -> None:
    for write in (to_awq, to_modelopt):
        with pytest.raises(ValueError, match="stores 4 bits, not 8"):
            write(a_grid(8))
    with pytest.raises(ValueError, match="no integers"):
        from_engine(FP8, {})


def test_rows_that_do_not_fill_words_are_refused() -> None:
    for write in (to_gptq, to_awq):
        with pytest.raises(ValueError, match="12 values do not fill words of 8"):
            write(a_grid(rows=12))
    with pytest.raises(ValueError, match="even number of rows"):
        to_modelopt(a_grid(rows=3))
    with pytest.raises(ValueError, match="symmetric"):
        to_modelopt(a_grid(zeros=True))
    assert from_pack_quantized(to_pack_quantized(a_grid(rows=3)), 4).codes.shape == (3, COLUMNS)


def test_words_of_another_dtype_are_refused() -> None:
    tensors = to_awq(a_grid())
    with pytest.raises(ValueError, match="int32 words"):
        from_awq({**tensors, "qweight": tensors["qweight"].long()})


def test_groups_that_no_engine_has_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 48 columns"):
        engine_group_size(4, 48, 96)
