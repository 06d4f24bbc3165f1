"""What cannot become a TensorRT-LLM checkpoint is refused with its reason, before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.trtllm_tiny import all_linears as every
from helpers.trtllm_tiny import dense_decoder, given_engine, tiny_spec
from mmr5_export.options import OptionError
from mmr5_export.quantize import quantize_linear
from mmr5_export.trtllm.engine_checkpoint import write_engine_checkpoint
from mmr5_export.trtllm.modelopt_formats import refuse_for_api, require_supported
from mmr5_export.trtllm.naming import trt_linears
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes
from mmr5_runtime.types import CheckpointError

SPEC = tiny_spec(2)


def refused(reason: str, spec: ModelSpec, formats: dict[str, Format], **known: Any) -> None:
    with pytest.raises(OptionError, match=rf"^--trt-target engine .*{reason}.*; .+\.$"):
        require_supported(spec, formats, **{"calibrated": True, "original": True, **known})


@pytest.mark.parametrize(
    ("format", "algo"),
    [(None, None), (INT4, "W4A16_AWQ"), (INT8, "W8A8_SQ_PER_CHANNEL"), (FP8, "FP8")],
)
def test_a_decoder_in_one_format_becomes_one_quantization(
    format: Format | None, algo: str | None
) -> None:
    formats = {} if format is None else every(SPEC, format)
    for head in ({}, {"lm_head": INT8_WEIGHT_ONLY}, {"visual.blocks.0.attn.qkv": INT8}):
        found = require_supported(SPEC, {**formats, **head}, calibrated=True, original=True)
        assert found.name == algo == found.to_json()["quant_algo"]


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        (Format("int4", 128, symmetric=False), "no zero points, and this int4 is asymmetric"),
        (Format("int4", 64), "groups of 64"),
        (Format("int4", 32), "groups of 32"),
        (INT8_WEIGHT_ONLY, "weight-only int8 was not compared"),
        (Format("int8", 128), "weight-only int8 was not compared"),
    ],
)
def test_formats_that_it_does_not_have_are_refused(format: Format, reason: str) -> None:
    refused(reason, SPEC, every(SPEC, format))


def test_linears_that_it_fuses_must_not_differ() -> None:
    mixed = every(SPEC, INT4) | {"model.layers.1.self_attn.v_proj": Format("int4", 64)}
    refused("alike, and they are w4a16-g128 .*and w4a16-g64 .*v_proj", SPEC, mixed)
    half = every(SPEC, INT4)
    del half["model.layers.0.self_attn.k_proj"]
    refused("alike, and they are w4a16-g128 .*and bf16 .*k_proj", SPEC, half)


def test_a_decoder_in_several_formats_is_refused() -> None:
    mixed = every(SPEC, INT4) | {"model.layers.1.mlp.down_proj": INT8_WEIGHT_ONLY}
    refused("w4a16-g128 .* and w8a16 .*down_proj", SPEC, mixed)
    dense_down = every(SPEC, INT8)
    del dense_down["model.layers.0.mlp.down_proj"]
    refused("w8a8-int8 .* and bf16 .*down_proj", SPEC, dense_down)


def test_a_tied_head_is_refused() -> None:
    refused("one table as embedding and head", tiny_spec(1, tied=True), {})


@pytest.mark.parametrize("format", [INT8, FP8])
def test_static_scales_need_calibration(format: Format) -> None:
    refused("nothing was calibrated", SPEC, every(SPEC, format), calibrated=False)
    require_supported(SPEC, every(SPEC, INT4), calibrated=False, original=False)


def test_fp8_needs_the_original_weights() -> None:
    refused("only be found in the unquantized", SPEC, every(SPEC, FP8), original=False)
    require_supported(SPEC, every(SPEC, INT8), calibrated=True, original=False)


def test_an_unknown_dtype_is_refused() -> None:
    refused("dtype 'float32'", SPEC, {}, dtype="float32")


def test_shapes_that_int4_does_not_fit_are_refused() -> None:
    text = SPEC.text
    odd = replace(SPEC, text=replace(text, vocab_size=96))
    refused("vocabulary in multiples of 64", odd, every(odd, INT4))
    require_supported(odd, every(odd, INT8), calibrated=True, original=True)
    narrow = replace(SPEC, text=replace(text, intermediate_size=192))
    refused("mlp.proj is 128 x 192, which groups of 128", narrow, every(narrow, INT4))
    uneven = replace(SPEC, text=replace(text, intermediate_size=255))
    refused("mlp.fc is 255 x 128", uneven, every(uneven, INT4))


@pytest.mark.parametrize("size", [192, 255])
def test_the_llm_api_refuses_shapes_that_int4_does_not_fit(size: int) -> None:
    """Before calibration: packing pairs of rows would fail behind it."""
    spec = replace(SPEC, text=replace(SPEC.text, intermediate_size=size))
    with pytest.raises(OptionError, match=f"llm-api .*{size}.*pairs of rows do not fit; .*fp8"):
        refuse_for_api(spec, every(spec, INT4))
    assert refuse_for_api(spec, every(spec, FP8)) == FP8
    assert refuse_for_api(SPEC, every(SPEC, INT4)) == INT4


def rounded(format: Format) -> dict[str, torch.Tensor]:
    """The stored tensors of a decoder rounded to nearest."""
    tensors = dense_decoder(SPEC)
    for name in decoder_linear_shapes(SPEC):
        parts, _ = quantize_linear(tensors.pop(f"{name}.weight").float(), format)
        tensors |= {f"{name}.{suffix}": part for suffix, part in parts.items()}
    return tensors


@pytest.mark.parametrize(("value", "fits"), [(70000.0, False), (2e-8, False), (6e-8, True)])
def test_scales_that_float16_cannot_hold_are_refused_unless_the_model_is_bfloat16(
    tmp_path: Path, value: float, fits: bool
) -> None:
    name = "model.layers.1.mlp.gate_proj"
    tensors = rounded(INT4)
    tensors[f"{name}.weight_scale"][3, 0] = value
    engine = given_engine(SPEC, every(SPEC, INT4), tensors)
    if fits:
        write_engine_checkpoint(engine, tmp_path)
        return
    with pytest.raises(OptionError, match=rf"scales of {name} .*float16 can hold; .*bfloat16"):
        write_engine_checkpoint(engine, tmp_path)
    assert not list(tmp_path.iterdir())
    write_engine_checkpoint(engine, tmp_path, "bfloat16")


@pytest.mark.parametrize("largest", [None, -1.0, float("inf"), float("nan")])
def test_an_input_without_a_range_is_named(tmp_path: Path, largest: float | None) -> None:
    name = "model.layers.1.self_attn.o_proj"
    absmax: dict[str, Any] = dict.fromkeys(decoder_linear_shapes(SPEC), 1.0)
    absmax[name] = largest
    if largest is None:
        del absmax[name]
    engine = given_engine(SPEC, every(SPEC, INT8), rounded(INT8), None, absmax)
    with pytest.raises(OptionError, match=f"{name} has no largest input"):
        write_engine_checkpoint(engine, tmp_path)
    assert not list(tmp_path.iterdir())


def test_values_beyond_float16_need_bfloat16(tmp_path: Path) -> None:
    absmax = dict.fromkeys(decoder_linear_shapes(SPEC), 70000.0)
    engine = given_engine(SPEC, every(SPEC, INT8), rounded(INT8), None, absmax)
    with pytest.raises(OptionError, match=r"reach 7e\+04, which float16 cannot hold; .*bfloat16"):
        write_engine_checkpoint(engine, tmp_path)
    tensors = dense_decoder(SPEC)
    tensors["model.norm.weight"][5] = 1e6
    engine = given_engine(SPEC, {}, tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .*bfloat16"):
        write_engine_checkpoint(engine, tmp_path)
    write_engine_checkpoint(engine, tmp_path, "bfloat16")


def test_every_linear_of_the_decoder_is_in_exactly_one_of_theirs() -> None:
    found = [name for linear in trt_linears(SPEC) for name in linear.sources]
    assert sorted(found) == sorted(decoder_linear_shapes(SPEC))
    fused = {linear.name.rpartition("0.")[2]: linear for linear in trt_linears(SPEC)[:5]}
    assert fused["mlp.fc"].sources == ("model.layers.0.mlp.gate_proj",)
    assert fused["mlp.gate"].sources == ("model.layers.0.mlp.up_proj",)
    assert fused["attention.qkv"].rows == (128, 64, 64)
