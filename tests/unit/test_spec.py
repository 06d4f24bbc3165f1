"""The spec read from config.json: sizes, names and refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny import make_hf_model, tiny_configs
from mmr5_kernels.layout import INT4, INT8, Format
from mmr5_runtime.spec import (
    ModelSpec,
    canonical_name,
    check_names,
    decoder_linear_shapes,
    linear_names,
    parameter_count,
    stored_shapes,
    tensor_shapes,
)
from mmr5_runtime.types import CheckpointError, EngineError


def flat_config(**changes: Any) -> dict[str, Any]:
    """The hub's config.json of the 7B."""
    config: dict[str, Any] = {
        "model_type": "qwen2_5_vl",
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "temporal_patch_size": 2,
        },
    }
    return config | changes


def vision_config(**changes: Any) -> dict[str, Any]:
    return {"vision_config": flat_config()["vision_config"] | changes}


def nested_config() -> dict[str, Any]:
    """The same model as newer transformers save it."""
    flat = flat_config()
    text = {key: flat.pop(key) for key in list(flat) if key not in {"model_type", "vision_config"}}
    ids = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "tie_word_embeddings")
    top = {key: text.pop(key) for key in ids}
    section = text.pop("rope_scaling")["mrope_section"]
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), "mrope_section": section}
    vision = flat["vision_config"]
    vision["in_channels"] = vision.pop("in_chans")
    vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": 10000.0}
    text |= {"rope_parameters": rope, "pad_token_id": None, "model_type": "qwen2_5_vl_text"}
    return flat | top | {"text_config": text}


SIZE_3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
} | vision_config(out_hidden_size=2048)
SIZE_72B = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
} | vision_config(out_hidden_size=8192, intermediate_size=3456)


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [(SIZE_3B, 3_754_622_976), ({}, 8_292_166_656), (SIZE_72B, 73_410_777_344)],
    ids=["3B", "7B", "72B"],
)
def test_parameter_count_is_the_published_one(changes: dict[str, Any], parameters: int) -> None:
    assert parameter_count(ModelSpec.from_hf_config(flat_config(**changes))) == parameters


def test_flat_and_nested_layouts_agree() -> None:
    flat = ModelSpec.from_hf_config(flat_config())
    assert ModelSpec.from_hf_config(nested_config()) == flat
    assert flat.text.head_dim == 128
    assert (flat.vision.head_dim, flat.vision.patch_dim, flat.vision.factor) == (80, 1176, 28)
    assert flat.text.max_position_embeddings == 128000


def test_nested_layout_may_repeat_the_flat_fields() -> None:
    both = flat_config(hidden_size=1) | nested_config()
    assert ModelSpec.from_hf_config(both) == ModelSpec.from_hf_config(flat_config())


def test_tied_embeddings_are_found_where_older_saves_put_them() -> None:
    config = nested_config()
    config["text_config"]["tie_word_embeddings"] = True
    spec = ModelSpec.from_hf_config(config)
    assert spec.text.tie_word_embeddings
    assert "lm_head.weight" not in tensor_shapes(spec)
    assert "lm_head" not in linear_names(spec)


def test_stop_ids_come_from_the_generation_config_first() -> None:
    generation = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
    spec = ModelSpec.from_hf_config(flat_config(), generation)
    assert (spec.eos_token_ids, spec.pad_token_id) == ((151645, 151643), 151643)
    assert ModelSpec.from_hf_config(flat_config()).eos_token_ids == (151645,)


@pytest.mark.parametrize("name", tiny_configs())
def test_names_and_shapes_equal_those_of_transformers(name: str) -> None:
    hf = make_hf_model(tiny_configs()[name])
    spec = ModelSpec.from_hf_config(json.loads(hf.config.to_json_string(use_diff=False)))
    stored = {canonical_name(key): tuple(t.shape) for key, t in hf.state_dict().items()}
    if spec.text.tie_word_embeddings:
        del stored["lm_head.weight"]
    assert tensor_shapes(spec) == stored
    linears = {
        canonical_name(key)
        for key, module in hf.named_modules()
        if type(module).__name__ == "Linear" and f"{canonical_name(key)}.weight" in stored
    }
    assert set(linear_names(spec)) == linears


def test_json_round_trip() -> None:
    spec = ModelSpec.from_hf_config(flat_config())
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "broken",
    [{}, {"vision": {}, "text": {}}, {"vision": 3}, {"surplus": 1}],
    ids=["empty", "no sizes", "no block", "unknown field"],
)
def test_unreadable_manifest_block_is_an_engine_error(broken: dict[str, Any]) -> None:
    known = ModelSpec.from_hf_config(flat_config()).to_json()
    data = known | broken if "surplus" in broken else broken
    with pytest.raises(EngineError, match="export the engine again"):
        ModelSpec.from_json(data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl'"),
        ({"model_type": None}, "model_type None"),
        ({"vision_config": None}, "no vision_config"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"num_hidden_layers": "28"}, "num_hidden_layers = '28'"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "linear", "type": "mrope"}}, "'linear'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "three sections"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 25]}}, "half of the head"),
        ({"image_token_id": 152064}, "152064"),
        (vision_config(out_hidden_size=2048), "2048"),
        (vision_config(window_size=100), "window_size"),
        (vision_config(num_heads=7), "num_heads"),
        (vision_config(hidden_act="gelu"), "vision_config"),
        (vision_config(rope_parameters={"rope_type": "yarn"}), "'yarn'"),
    ],
)
def test_config_that_cannot_be_run_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        ModelSpec.from_hf_config(flat_config(**changes))
    assert words in str(error.value)
    assert str(error.value).count("\n") == 0


def test_explicit_head_dim_may_differ_from_the_quotient() -> None:
    config = flat_config(head_dim=64, rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]})
    shapes = tensor_shapes(ModelSpec.from_hf_config(config))
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (28 * 64, 3584)
    assert shapes["model.layers.0.self_attn.k_proj.bias"] == (4 * 64,)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (3584, 28 * 64)


def test_early_vision_config_means_the_defaults_of_the_format() -> None:
    short = {"hidden_size": 1280, "in_chans": 3, "spatial_patch_size": 14}
    spec = ModelSpec.from_hf_config(flat_config(vision_config=short))
    assert spec.vision == ModelSpec.from_hf_config(flat_config()).vision


@given(st.text(alphabet="abc.0", max_size=12))
def test_canonical_name_maps_both_towers_and_nothing_else(rest: str) -> None:
    assert canonical_name(f"model.visual.{rest}") == f"visual.{rest}"
    assert canonical_name(f"model.language_model.{rest}") == f"model.{rest}"
    for classic in (f"visual.{rest}", f"model.layers.{rest}", "lm_head.weight"):
        assert canonical_name(classic) == classic


def test_quantized_storage_replaces_the_weight() -> None:
    spec = ModelSpec.from_hf_config(flat_config())
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    shapes = stored_shapes(spec, {q: INT4, down: INT8})
    assert f"{q}.weight" not in shapes
    assert shapes[f"{q}.weight_packed"] == (3584, 448)
    assert shapes[f"{q}.weight_scale"] == (3584, 28)
    assert shapes[f"{q}.weight_shape"] == (2,)
    assert shapes[f"{q}.bias"] == (3584,)
    assert shapes[f"{down}.weight"] == (3584, 18944)
    assert shapes[f"{down}.weight_scale"] == (3584, 1)
    assert len(decoder_linear_shapes(spec)) == 28 * 7


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ({"model.layers.99.mlp.up_proj": INT8}, "layers.99"),
        ({"visual.blocks.0.mlp.down_proj": INT8}, r"blocks\.0\.mlp\.\* are quantized in part"),
        ({"visual.blocks.0.attn.qkv": INT4}, "takes no groups"),
    ],
)
def test_formats_that_no_engine_can_have_are_refused(
    formats: dict[str, Format], words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        stored_shapes(ModelSpec.from_hf_config(flat_config()), formats)


def test_missing_and_left_over_tensors_are_named() -> None:
    spec = ModelSpec.from_hf_config(flat_config())
    names = set(tensor_shapes(spec))
    check_names(spec, names)
    with pytest.raises(CheckpointError, match=r"lack model\.norm\.weight;"):
        check_names(spec, names - {"model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"hold lm_head\.bias, model\.extra,"):
        check_names(spec, names | {"model.extra", "lm_head.bias"})
    with pytest.raises(CheckpointError, match="and 388 more"):
        check_names(spec, {name for name in names if name.startswith("model.")})
