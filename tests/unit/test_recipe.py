"""Recipes: what the shipped ones mean, how globs and defaults combine, and every refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import tiny_configs
from mmr5_export.mixed import choose_mixed, group_bytes, layer_groups
from mmr5_export.options import OptionError
from mmr5_export.recipe import METHODS, RECIPES, LayerRule, Mixed, Recipe, load_recipe
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes, vision_linear_shapes
from mmr5_runtime.types import CheckpointError

DOWN = "model.layers.0.mlp.down_proj"


def spec_of(name: str) -> ModelSpec:
    return ModelSpec.from_hf_config(json.loads(tiny_configs()[name].to_json_string(use_diff=False)))


SPEC = spec_of("int4")


def recipe(*rules: LayerRule, **quant: Any) -> Recipe:
    return Recipe(**({"name": "mine", "format": "int4"} | quant), layers=rules)


@pytest.mark.parametrize(
    ("name", "format", "method"),
    [
        ("bf16", None, "rtn"),
        ("int8", INT8, "smoothquant+gptq"),
        ("int8-weight-only", INT8_WEIGHT_ONLY, "rtn"),
        ("fp8", FP8, "rtn"),
        ("int4", INT4, "gptq"),
        ("int4-mixed", INT4, "gptq"),
    ],
)
def test_shipped_recipes(name: str, format: Format | None, method: str) -> None:
    shipped = load_recipe(name)
    head = {} if format is None else {"lm_head": INT8_WEIGHT_ONLY}
    decoder = {} if format is None else dict.fromkeys(decoder_linear_shapes(SPEC), format)
    assert shipped.formats(SPEC) == decoder | head
    assert shipped.name == name
    assert shipped.method(DOWN) == method and shipped.method("lm_head") == "rtn"
    assert (shipped.mixed is not None) == (name == "int4-mixed")


def test_every_shipped_file_is_listed() -> None:
    import mmr5_export.recipe as module

    folder = Path(module.__file__).with_name("recipes")
    assert sorted(path.stem for path in folder.iterdir()) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_json_form_reads_back(name: str) -> None:
    shipped = load_recipe(name)
    again = Recipe.from_json(json.loads(json.dumps(shipped.to_json())))
    assert again.to_json() == shipped.to_json()
    assert again.formats(SPEC) == shipped.formats(SPEC)


def test_file_with_everything(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("""
[quant]
name = "mine"
format = "int4"
method = "awq"
group_size = 64
symmetric = false
lm_head = "int4"
vision = "fp8"
damp = 0.05
[[layers]]
match = "model.layers.*.mlp.down_proj"
format = "int8-weight-only"
[[layers]]
match = "model.layers.0.mlp.down_proj"
format = "int4"
group_size = 32
symmetric = true
method = "gptq"
[[layers]]
match = "*.self_attn.*"
format = "bf16"
[[layers]]
match = "visual.merger.*"
format = "bf16"
[mixed]
format = "bf16"
bits_per_weight = 9
""")
    mine = load_recipe(str(path))
    asymmetric = Format("int4", 64, symmetric=False)
    formats = mine.formats(SPEC)
    assert formats.pop("lm_head") == asymmetric
    assert formats.pop(DOWN) == Format("int4", 32)
    others = range(1, SPEC.text.num_layers)
    assert {formats.pop(f"model.layers.{i}.mlp.down_proj") for i in others} == {INT8_WEIGHT_ONLY}
    blocks = {name for name in vision_linear_shapes(SPEC) if ".blocks." in name}
    gates = {f"model.layers.{i}.mlp.{part}_proj" for i in (0, *others) for part in ("gate", "up")}
    assert formats == dict.fromkeys(blocks, FP8) | dict.fromkeys(gates, asymmetric)
    assert [mine.method(name) for name in (DOWN, "model.layers.1.mlp.down_proj")] == ["gptq", "awq"]
    assert mine.method("visual.blocks.0.attn.qkv") == "rtn" and mine.damp == 0.05
    assert Recipe.from_json(mine.to_json()) == mine


def test_method_of_a_rule_is_the_recipes_where_it_makes_the_format() -> None:
    mine = recipe(
        LayerRule("model.layers.0.mlp.*", "int8-weight-only"),
        LayerRule("model.layers.1.mlp.*", "fp8"),
        LayerRule("model.layers.1.self_attn.*", "int8"),
    )
    assert mine.method("model.layers.0.self_attn.o_proj") == "gptq"
    assert mine.method("model.layers.0.mlp.down_proj") == "gptq"
    assert mine.method("model.layers.1.mlp.down_proj") == "rtn"
    assert mine.method("model.layers.1.self_attn.o_proj") == "gptq"


def test_options_replace_what_the_file_says() -> None:
    other = replace(load_recipe("int4"), default_method="rtn", group_size=32, symmetric=False)
    assert set(other.formats(SPEC).values()) == {Format("int4", 32, False), INT8_WEIGHT_ONLY}
    assert other.method(DOWN) == "rtn"


def test_int8_weight_only_takes_groups_when_asked() -> None:
    grouped = recipe(format="int8-weight-only", group_size=64)
    assert grouped.formats(SPEC)[DOWN] == Format("int8", group_size=64)
    assert grouped.formats(SPEC)["lm_head"] == INT8_WEIGHT_ONLY


def test_tied_head_is_quantized_on_its_own() -> None:
    tied = spec_of("tied")
    assert recipe(format="int8").formats(tied)["lm_head"] == INT8_WEIGHT_ONLY
    assert "lm_head" not in recipe(format="int8", lm_head="bf16").formats(tied)
    assert recipe(LayerRule("lm_head", "bf16"), format="int8").formats(tied).keys() == set(
        decoder_linear_shapes(tied)
    )


def test_mixed_choice_from_candidates_to_formats() -> None:
    mine = replace(
        load_recipe("int4-mixed"),
        mixed=Mixed("int8-weight-only", 6.0),
        layers=(LayerRule("model.layers.0.self_attn.o_proj", "bf16"),),
    )
    candidates = mine.candidates(SPEC)
    assert candidates["model.layers.0.o_proj"] == {"bf16": None}
    assert candidates["model.layers.1.o_proj"] == {
        "int4": INT4,
        "int8-weight-only": INT8_WEIGHT_ONLY,
    }
    errors = {
        group: {name: 1.0 + len(group) if name == "int4" else 0.1 for name in formats}
        for group, formats in candidates.items()
    }
    assert mine.mixed is not None
    sizes, budget = group_bytes(SPEC, candidates), mine.mixed.budget_bytes(SPEC)
    chosen = choose_mixed(errors, sizes, budget)
    resolved = mine.with_choice(SPEC, chosen)
    assert resolved.mixed is None
    formats = resolved.formats(SPEC)
    for group, linears in layer_groups(SPEC).items():
        for linear in linears:
            assert formats.get(linear) == candidates[group][chosen[group]]
            assert resolved.method(linear) == ("rtn" if chosen[group] == "bf16" else "gptq")
    assert INT8_WEIGHT_ONLY in formats.values() and INT4 in formats.values()
    assert Recipe.from_json(resolved.to_json()).formats(SPEC) == formats
    weights = sum(rows * columns for rows, columns in decoder_linear_shapes(SPEC).values())
    assert budget == weights * 6 // 8


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([LayerRule("model.layers.7.*", "bf16")], r"'model\.layers\.7\.\*' matches no linear"),
        ([LayerRule("*.q_proj", "int8")], "run as one differ.*q_proj int8.*k_proj int4"),
        (
            [LayerRule("model.*.up_proj", "int4", method="rtn")],
            "run as one differ in format or method",
        ),
        ([LayerRule("model.*.gate_proj", "int4", 32)], "run as one differ"),
        ([LayerRule("lm_head", "fp8")], "format of lm_head is 'fp8'; choose one of bf16, int8-"),
        ([LayerRule("lm_head", "int4", method="gptq")], "lm_head is always rounded to nearest"),
        ([LayerRule("visual.*", "int4")], "format of visual.* is 'int4'; choose one of bf16, int8"),
        ([LayerRule("visual.*.gate_proj", "int8")], "run as one differ.*visual"),
        ([LayerRule("visual.*.down_proj", "int8")], "visual.blocks.0.mlp.*in part"),
    ],
)
def test_rules_that_do_not_fit_the_model(rules: list[LayerRule], message: str) -> None:
    with pytest.raises(OptionError, match=message) as raised:
        recipe(*rules).formats(SPEC)
    assert str(raised.value).startswith("recipe mine: ") and str(raised.value).endswith(".")
    assert not str(raised.value).endswith("..")


def test_groups_that_do_not_divide_name_the_linear() -> None:
    # 72 and 80 columns; a rule may except the linears that do not fit.
    with pytest.raises(CheckpointError, match="q_proj has 80 columns.*no group size does"):
        recipe().formats(spec_of("tied"))
    excepted = recipe(LayerRule("model.layers.*", "int8"), lm_head="bf16")
    assert set(excepted.formats(spec_of("tied")).values()) == {INT8}


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({"format": "int5"}, "format of .quant. is 'int5'; choose one of bf16, int8, "),
        ({"format": "fp8", "default_method": "gptq"}, "method .* fp8 is 'gptq'; choose one of rtn"),
        ({"default_method": "smoothquant+gptq"}, "for int4 is 'smooth.*; choose one of gptq, awq"),
        ({"lm_head": "fp8"}, "lm_head is 'fp8'; choose one of bf16, int8, int4"),
        ({"vision": "int4"}, "vision is 'int4'; choose one of bf16, int8, fp8"),
        ({"group_size": 48}, r"cannot be stored: group size 48 is not one of \(32, 64, 128\)"),
        ({"format": "int8", "group_size": 64}, "group_size has no meaning for int8"),
        ({"format": "int8", "symmetric": False}, "only int4 can be asymmetric"),
        ({"damp": 0.0}, "damp is a fraction"),
        ({"mixed": Mixed("int4", 5.0)}, "another format"),
        ({"mixed": Mixed("int8", float("nan"))}, "between 0 and 16"),
        ({"mixed": Mixed("int9", 5.0)}, "'int9'; choose"),
    ],
)
def test_quant_tables_that_mean_nothing(quant: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        recipe(**quant)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (LayerRule("*", "int6"), r"format of '\*' is 'int6'"),
        (LayerRule("*", "fp8", method="awq"), r"method of '\*' for fp8 is 'awq'"),
        (LayerRule("*", "fp8", 32), "group_size .* has no meaning for fp8"),
        (LayerRule("*", "int8-weight-only", symmetric=False), "symmetric .* has no meaning"),
        (LayerRule("*", "int8-weight-only", 16), "group size 16"),
    ],
)
def test_rules_that_mean_nothing(rule: LayerRule, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        recipe(rule)


HEAD = '[quant]\nname = "a"\nformat = "int4"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[quant", "is not TOML"),
        ("", r"\[quant\] is missing"),
        ('[quant]\nname = "a"', r"\[quant\] lacks 'format'"),
        (HEAD + 'grouping = 3\n[other]\nx = "1"', r"\[other\] is unknown"),
        (HEAD + "grouping = 3", r"\[quant\] has no key 'grouping'; it takes name, format"),
        (HEAD + 'group_size = "128"', "group_size is '128'; write a whole number"),
        (HEAD + "group_size = true", "group_size is True; write a whole number"),
        (HEAD + "symmetric = 1", "symmetric is 1; write true or false"),
        (HEAD + 'damp = "a"', "damp is 'a'; write a number"),
        (HEAD + "[layers]\nmatch = 'x'", r"write \[\[layers\]\]"),
        (HEAD + "[[layers]]\nmatch = 'x'", r"\[\[layers\]\] number 1 lacks 'format'"),
        (HEAD + "[mixed]\nformat = 'int8'", r"\[mixed\] lacks 'bits_per_weight'"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=message) as raised:
        load_recipe(str(path))
    assert str(path) in str(raised.value)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no recipe 'int3'; choose one of bf16, int8"):
        load_recipe("int3")
    with pytest.raises(OptionError, match="cannot be read"):
        load_recipe(str(tmp_path / "absent.toml"))


def test_methods_are_known_for_every_format() -> None:
    for name, methods in METHODS.items():
        for method in methods:
            assert recipe(format=name, default_method=method).method(DOWN) == method


def test_a_budget_below_the_smallest_formats_is_refused_at_once() -> None:
    """Before a model has answered anything; 4 bits and a bf16 scale per 128 are 4.125."""
    mixed = replace(load_recipe("int4-mixed"), mixed=Mixed("int8-weight-only", 4.1))
    with pytest.raises(OptionError, match="4.1 bits per weight are fewer .* allow 4.2 or more"):
        mixed.formats(SPEC)
    assert replace(mixed, mixed=Mixed("int8-weight-only", 4.2)).formats(SPEC)
