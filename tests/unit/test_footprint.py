"""Memory of weights that are not there yet, against what it is once they are."""

from __future__ import annotations

import pytest
import torch

from helpers.stored import FORMATS, format_name, random_parts
from mmr5_kernels import dispatch, footprint
from mmr5_kernels.eight_bit import KINDS, eight_bit_copy
from mmr5_kernels.layout import INT4, INT8_WEIGHT_ONLY, Format
from mmr5_kernels.target import INTERPRETED, Target

BF16, FP32 = torch.bfloat16, torch.float32
CUDA = Target("cuda", (9, 0), "cuda", interpreted=True)
CPU = Target("cpu")


@pytest.mark.parametrize("target", [CPU, Target("cuda"), INTERPRETED, CUDA], ids=str)
@pytest.mark.parametrize("format", [None, *FORMATS], ids=format_name)
def test_bytes_are_those_of_the_prepared_weight(format: Format | None, target: Target) -> None:
    for dtype in (BF16, FP32):
        for n, k in ((64, 256), (48, 128), (37, 384)):
            prepared = dispatch.prepare(format, random_parts(format, n, k), dtype, "cpu", target)
            assert footprint.weight_bytes(format, target, dtype, n, k) == prepared.num_bytes
            assert prepared.step_bytes <= prepared.num_bytes


def test_a_step_reads_one_of_two_layouts() -> None:
    prepared = dispatch.prepare(INT4, random_parts(INT4, 64, 256), BF16, "cpu", CUDA)
    assert set(prepared.operands) == {"skinny", "w4_tiles"}
    tiles = sum(part.nbytes for part in prepared.operands["w4_tiles"].values())
    assert prepared.step_bytes == tiles < prepared.num_bytes
    triton = dispatch.prepare(INT4, random_parts(INT4, 64, 256), BF16, "cpu", INTERPRETED)
    assert triton.step_bytes == triton.num_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", [f for f in FORMATS if not f.activations], ids=format_name)
def test_an_8_bit_copy_takes_what_it_adds(format: Format, kind: str) -> None:
    parts = random_parts(format, 48, 128)
    _, copied = eight_bit_copy(format, parts, kind)
    shared = {part.data_ptr() for part in parts.values()}
    added = sum(part.nbytes for part in copied.values() if part.data_ptr() not in shared)
    assert footprint.copy_bytes(format, kind, 48, 128) == added


def test_scratch_is_for_what_is_expanded() -> None:
    for format in (INT4, INT8_WEIGHT_ONLY):
        assert footprint.scratch_bytes(format, INTERPRETED, BF16, 48, 128) == 48 * 128 * 2
        assert footprint.scratch_bytes(format, CPU, BF16, 48, 128) == 0
    assert footprint.scratch_bytes(None, INTERPRETED, BF16, 48, 128) == 0
