"""Estimates of memory: exact where they can be, monotone, and turned into what would fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import stepping
from helpers.tiny import tiny_configs
from mmr5_bench.random_weights.shapes import formats_of, spec_of, stored_bytes
from mmr5_bench.random_weights.tensors import RandomTensors
from mmr5_kernels.layout import INT4
from mmr5_kernels.target import INTERPRETED, Target
from mmr5_runtime.capacity import (
    Need,
    gib,
    kv_bytes_per_token,
    loaded_bytes,
    prefill_bytes,
    vision_bytes,
    weight_bytes,
)
from mmr5_runtime.compute import Prefill
from mmr5_runtime.linear import Linear
from mmr5_runtime.model import Model
from mmr5_runtime.spec import ModelSpec

SPEC = ModelSpec.from_hf_config(json.loads(tiny_configs()["int4"].to_json_string(use_diff=False)))
BIG = spec_of("7b")
BF16 = torch.bfloat16
CUDA = Target("cuda", (9, 0), "cuda", interpreted=True)


def need(pages: int = 10, page_tokens: int = 1280, other: int = 2000, **more: Any) -> Need:
    options = {"kv": "bf16", **more}
    return Need.of(
        BIG, BF16, options["kv"], pages=pages, page_tokens=page_tokens, other_tokens=other
    )


def test_weights_are_counted_as_they_are_stored() -> None:
    assert weight_bytes(BIG, formats_of("7b", "int4")) == stored_bytes("7b", "int4")
    dense, packed = weight_bytes(BIG, {}), weight_bytes(BIG, formats_of("7b", "int4"))
    assert dense == 2 * 8_292_166_656  # the published checkpoint's parameters, in bf16
    assert packed < 0.45 * dense
    names = {"model.layers.0.mlp.down_proj": INT4}
    assert weight_bytes(SPEC, names) < weight_bytes(SPEC, {})


def taken(model: Model) -> int:
    """Bytes of everything that holds weights, shared memory once."""
    found = [b for name, b in model.named_buffers() if "rotary" not in name]
    scratch = set()
    for linear in (module for module in model.modules() if isinstance(module, Linear)):
        scratch |= {linear._scratch} - {None}
        for prepared in filter(None, (linear.prepared, linear.many)):
            found += [part for parts in prepared.operands.values() for part in parts.values()]
            found += [] if prepared.bias is None else [prepared.bias]
    by_address = {tensor.data_ptr(): tensor.nbytes for tensor in found}
    return sum(by_address.values()) + sum(part.num_bytes for part in scratch if part is not None)


@pytest.mark.parametrize("target", [Target("cpu"), INTERPRETED, CUDA], ids=lambda t: t.kernels)
@pytest.mark.parametrize("prefill", ["exact", "int8", "fp8"])
@pytest.mark.parametrize("quant", ["bf16", "int4", "int4-asym", "int8", "int8-weight-only"])
def test_loaded_weights_take_what_is_said(quant: str, prefill: Prefill, target: Target) -> None:
    spec = stepping.spec_of(stepping.SMALL)
    formats = stepping.formats_of(spec, quant)
    tensors = RandomTensors(spec, formats, torch.device("cpu"))
    model = Model.from_tensors(
        spec, tensors.get, formats, BF16, "cpu", target=target, prefill=prefill
    )
    said = loaded_bytes(spec, formats, BF16, target, prefill)
    found = taken(model)
    if target.device_type == "cpu":
        assert found == said
    else:
        assert 0 <= found - said <= 0.03 * found  # zeros that pad the MLP of the tower


def test_a_step_is_said_to_read_the_layout_it_reads() -> None:
    spec = stepping.spec_of(stepping.SMALL)
    formats = stepping.formats_of(spec, "int4")

    def model(target: Target, prefill: Prefill = "exact") -> Model:
        tensors = RandomTensors(spec, formats, torch.device("cpu"))
        return Model.from_tensors(
            spec, tensors.get, formats, BF16, "cpu", target=target, prefill=prefill
        )

    triton, both = model(INTERPRETED).decoder, model(CUDA).decoder
    assert both.step_bytes == pytest.approx(triton.step_bytes, rel=0.02)  # padding of the tiles
    assert model(INTERPRETED, "int8").decoder.step_bytes == triton.step_bytes


def test_a_second_copy_and_a_second_layout_are_counted() -> None:
    formats = formats_of("7b", "int4")

    def total(kernels: str = "triton", prefill: str = "exact") -> int:
        return loaded_bytes(BIG, formats, BF16, Target("cuda", (9, 0), kernels), prefill)

    decoder = 6_525_616_128  # weights of the linears of the 28 layers
    scratch = 2 * 18944 * 3584 * 2  # gate and up in bf16
    shapes = 16 * sum(format.weights == "int4" for format in formats.values())  # stored only
    assert total() - weight_bytes(BIG, formats) == scratch - shapes
    for prefill in ("int8", "fp8"):
        assert total(prefill=prefill) - total() + scratch == pytest.approx(decoder, rel=0.01)
    assert total("cuda") - total() == pytest.approx(decoder / 2, rel=0.05)


def test_keys_and_values_of_the_published_7b() -> None:
    assert kv_bytes_per_token(BIG.text, BF16) == 57_344
    assert kv_bytes_per_token(BIG.text, torch.float32) == 114_688
    # 2 x 28 layers x 4 heads of 128 codes and a scale of 4 bytes.
    assert kv_bytes_per_token(BIG.text, BF16, "int8") == 29_568


def test_activations_hold_the_largest_result_of_a_layer() -> None:
    tokens = 1280
    assert prefill_bytes(BIG.text, BF16, tokens) > tokens * 2 * BIG.text.intermediate_size * 2
    patches = 4 * tokens
    assert vision_bytes(BIG.vision, BF16, patches) > patches * BIG.vision.patch_dim * 4
    assert prefill_bytes(BIG.text, torch.float32, 10) > prefill_bytes(BIG.text, BF16, 10)


@given(
    pages=st.integers(1, 60),
    tokens=st.integers(1, 16384),
    other=st.integers(0, 5000),
    free=st.integers(0, 1 << 38),
)
def test_what_is_said_to_fit_fits_and_one_more_does_not(
    pages: int, tokens: int, other: int, free: int
) -> None:
    asked = need(pages, tokens, other)
    fitting = asked.pages_within(free)
    if fitting:
        assert need(fitting, tokens, other).total <= free
    assert need(fitting + 1, tokens, other).total > free
    smaller = asked.page_tokens_within(free)
    assert 0 <= smaller <= tokens
    if smaller:
        # Activations of the tower and of the decoder are linear in the page, up to rounding.
        assert need(pages, smaller, other).total <= free + asked.activations // tokens + 1
    else:
        assert need(pages, 1, other).total > free - asked.activations // tokens - 1


def test_ten_large_pages_with_int4_weights_stay_below_12_gb() -> None:
    total = weight_bytes(BIG, formats_of("7b", "int4")) + need().total
    assert total < 12e9


def test_sizes_for_people() -> None:
    assert gib(3 << 29) == "1.50 GiB"
    assert gib(300 << 20) == "300.0 MiB"


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_a_need_adds_up(kv: str) -> None:
    asked = need(2, 100, 30, kv=kv)
    assert asked.tokens == 230
    assert asked.kv == 230 * asked.kv_per_token
    assert asked.total == asked.kv + asked.activations
