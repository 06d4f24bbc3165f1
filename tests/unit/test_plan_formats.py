"""What the options of an export make of every linear, and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.synthetic7b import config_7b
from helpers.tiny import tiny_configs
from mmr5_export.plan import QUANTS, linear_formats, make_plan
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes, vision_linear_shapes
from mmr5_runtime.types import CheckpointError, ExportError

DECODER = {"int8": INT8, "int8-weight-only": INT8_WEIGHT_ONLY, "fp8": FP8, "int4": INT4}


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return ModelSpec.from_hf_config(config_7b(layers=2, blocks=2))


def tiny(name: str) -> ModelSpec:
    return ModelSpec.from_hf_config(json.loads(tiny_configs()[name].to_json_string(use_diff=False)))


def test_every_quant_is_tested() -> None:
    assert set(QUANTS) == {"bf16", *DECODER}


@pytest.mark.parametrize("quant", DECODER)
def test_decoder_and_head_are_quantized_and_the_rest_is_not(quant: str, spec: ModelSpec) -> None:
    formats = linear_formats(spec, quant)
    assert formats.pop("lm_head") == INT8_WEIGHT_ONLY
    assert formats == dict.fromkeys(decoder_linear_shapes(spec), DECODER[quant])


def test_bf16_quantizes_nothing_unless_asked(spec: ModelSpec) -> None:
    assert linear_formats(spec, "bf16") == {}
    assert linear_formats(spec, "bf16", lm_head="int8") == {"lm_head": INT8_WEIGHT_ONLY}


def test_group_size_and_symmetry_are_those_of_int4(spec: ModelSpec) -> None:
    formats = linear_formats(spec, "int4", "int4", group_size=32, symmetric=False)
    assert set(formats.values()) == {Format("int4", 32, symmetric=False)}
    assert "lm_head" not in linear_formats(spec, "int4", "bf16")


@pytest.mark.parametrize(("vision", "format"), [("int8", INT8), ("fp8", FP8)])
def test_the_tower_on_demand(vision: str, format: Format, spec: ModelSpec) -> None:
    formats = linear_formats(spec, "int4", vision=vision)
    assert {formats[name] for name in vision_linear_shapes(spec)} == {format}


def test_a_plan_lists_what_the_formats_store(spec: ModelSpec) -> None:
    q = "model.layers.0.self_attn.q_proj"
    formats = linear_formats(spec, "int4", group_size=64, symmetric=False)
    stored = {t.name: (t.shape, t.dtype) for t in make_plan(spec, formats).stored}
    wanted = Format("int4", 64, symmetric=False).tensors(3584, 3584)
    assert {k: v for k, v in stored.items() if k.startswith(f"{q}.weight")} == {
        f"{q}.{suffix}": tensor for suffix, tensor in wanted.items()
    }
    assert f"{q}.weight" not in stored and f"{q}.bias" in stored


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quant": "int3"}, "quantization 'int3' is unknown; choose one of bf16, int4, int8"),
        ({"quant": "int4", "lm_head": "fp8"}, "lm_head 'fp8' is unknown; choose one of bf16, int8"),
        ({"quant": "int4", "vision": "int4"}, "vision 'int4' is unknown; choose one of bf16, int8"),
        ({"quant": "int4", "group_size": 16}, "group size 16 is not one of"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], words: str, spec: ModelSpec) -> None:
    with pytest.raises(ExportError, match=words):
        linear_formats(spec, **options)


@pytest.mark.parametrize(
    ("name", "group_size", "words"),
    [
        (
            "three_heads",
            128,
            "q_proj has 48 columns, which int4 groups of 128 do not fit; no group",
        ),
        (
            "small_patches",
            32,
            "q_proj has 72 columns, which int4 groups of 32 do not fit; no group",
        ),
    ],
)
def test_groups_that_do_not_fit_name_the_linear(name: str, group_size: int, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        linear_formats(tiny(name), "int4", group_size=group_size)


def test_group_sizes_that_do_fit_are_named() -> None:
    spec = tiny("three_heads")
    formats = {"model.layers.0.mlp.down_proj": Format("int8", 128)}
    with pytest.raises(CheckpointError, match="90 columns, which int8 groups of 128 do not fit"):
        make_plan(spec, formats)
    wide = ModelSpec.from_hf_config(config_7b(1, 1) | {"intermediate_size": 18912})  # 32 x 591
    with pytest.raises(CheckpointError, match="18912 columns.* a group size of 32 fits, and so"):
        linear_formats(wide, "int4")
