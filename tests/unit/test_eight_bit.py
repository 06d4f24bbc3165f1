"""The second, 8-bit copy of a weight that reads prompts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.stored import FORMATS, format_name, random_parts
from mmr5_kernels import eight_bit, reference
from mmr5_kernels.eight_bit import eight_bit_copy
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format

WEIGHT_ONLY = [None, *(format for format in FORMATS if not format.activations)]


def values(format: Format | None, parts: dict[str, Tensor]) -> Tensor:
    if format is None:
        return parts["weight"].float()
    return reference.dequantize(format, parts, torch.float32)


@pytest.mark.parametrize("kind", eight_bit.KINDS)
@pytest.mark.parametrize("format", WEIGHT_ONLY, ids=format_name)
def test_the_copy_is_the_nearest_codes(format: Format | None, kind: str) -> None:
    parts = random_parts(format, 24, 256)
    copied, tensors = eight_bit_copy(format, parts, kind)
    assert (copied.weights, copied.activations, copied.group_size) == (kind, kind, None)
    for suffix, (shape, dtype) in copied.tensors(24, 256).items():
        assert tuple(tensors[suffix].shape) == shape and tensors[suffix].dtype == dtype
    wanted, scale = values(format, parts), tensors["weight_scale"].float()
    steps = wanted / scale
    if kind == "int8":
        assert (steps - tensors["weight"].float()).abs().max() <= 0.5
    else:
        assert torch.equal(steps.clamp(-448, 448).to(torch.float8_e4m3fn), tensors["weight"])
    assert reference.sqnr_db(wanted, tensors["weight"].float() * scale) >= 29


def test_rows_of_int8_weights_keep_their_codes() -> None:
    parts = random_parts(INT8_WEIGHT_ONLY, 8, 64)
    copied, tensors = eight_bit_copy(INT8_WEIGHT_ONLY, parts, "int8")
    assert copied == INT8
    assert all(tensors[name] is parts[name] for name in ("weight", "weight_scale"))


def test_some_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts(Format("int4", 32, symmetric=False), 21, 128) | {"bias": torch.ones(21)}
    _, whole = eight_bit_copy(Format("int4", 32, symmetric=False), parts, "int8")
    monkeypatch.setattr(eight_bit, "_BLOCK_WEIGHTS", 128 * 5)
    _, found = eight_bit_copy(Format("int4", 32, symmetric=False), parts, "int8")
    assert found.keys() == whole.keys() == {"weight", "weight_scale", "bias"}
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_row_of_zeros_stays_zero() -> None:
    for kind in eight_bit.KINDS:
        _, tensors = eight_bit_copy(None, {"weight": torch.zeros(2, 32)}, kind)
        assert not tensors["weight"].float().any() and (tensors["weight_scale"] == 1).all()


@pytest.mark.parametrize(
    ("format", "kind", "words"),
    [
        (INT4, "int4", "int8 or fp8, not 'int4'"),
        (INT8, "fp8", "w8a8-int8 weight has 8 bits already"),
        (FP8, "fp8", "w8a8-fp8 weight has 8 bits already"),
    ],
)
def test_what_needs_no_copy_is_refused(format: Format, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        eight_bit_copy(format, random_parts(format, 8, 128), kind)
