"""The plan of an engine: what formats store of every linear, and groups that do not fit."""

from __future__ import annotations

import json

import pytest

from helpers.synthetic7b import config_7b
from helpers.tiny import tiny_configs
from mmr5_export.plan import make_plan
from mmr5_kernels.layout import INT4, Format
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes
from mmr5_runtime.types import CheckpointError


def tiny(name: str) -> ModelSpec:
    return ModelSpec.from_hf_config(json.loads(tiny_configs()[name].to_json_string(use_diff=False)))


def test_a_plan_lists_what_the_formats_store() -> None:
    spec = ModelSpec.from_hf_config(config_7b(layers=2, blocks=2))
    q, format = "model.layers.0.self_attn.q_proj", Format("int4", 64, symmetric=False)
    plan = make_plan(spec, dict.fromkeys(decoder_linear_shapes(spec), format))
    stored = {t.name: (t.shape, t.dtype) for t in plan.stored}
    assert {k: v for k, v in stored.items() if k.startswith(f"{q}.weight")} == {
        f"{q}.{suffix}": tensor for suffix, tensor in format.tensors(3584, 3584).items()
    }
    assert f"{q}.weight" not in stored and f"{q}.bias" in stored


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("three_heads", 128, "48 columns, which int4 groups of 128"),
        ("small_patches", 32, "72 columns, which int4 groups of 32"),
    ],
)
def test_groups_that_do_not_fit_name_the_linear(name: str, size: int, words: str) -> None:
    formats = dict.fromkeys(decoder_linear_shapes(tiny(name)), Format("int4", size))
    with pytest.raises(
        CheckpointError, match=f"q_proj has {words} do not fit; no group size does, but int8, fp8"
    ):
        make_plan(tiny(name), formats)


def test_group_sizes_that_do_fit_are_named() -> None:
    formats = {"model.layers.0.mlp.down_proj": Format("int8", 128)}
    with pytest.raises(CheckpointError, match="90 columns, which int8 groups of 128 do not fit"):
        make_plan(tiny("three_heads"), formats)
    wide = ModelSpec.from_hf_config(config_7b(1, 1) | {"intermediate_size": 18912})  # 32 x 591
    with pytest.raises(CheckpointError, match="18912 columns.* a group size of 32 fits, and so do"):
        make_plan(wide, dict.fromkeys(decoder_linear_shapes(wide), INT4))
