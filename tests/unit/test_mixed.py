"""Mixed precision: budgets are kept, and what fits is what gains most."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny import tiny_configs
from mmr5_export.mixed import choose_mixed, group_bytes, layer_groups
from mmr5_kernels.layout import INT4, INT8_WEIGHT_ONLY
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes
from mmr5_runtime.types import ExportError

Table = dict[str, dict[str, float]]
Sizes = dict[str, dict[str, int]]
FORMATS = ("int4", "int8", "bf16")


@st.composite
def tables(draw: st.DrawFn) -> tuple[Table, Sizes]:
    """Errors and sizes of up to five groups in up to three formats, in no order at all."""
    groups = [f"g{number}" for number in range(draw(st.integers(1, 5)))]
    names = {
        group: draw(st.lists(st.sampled_from(FORMATS), min_size=1, unique=True)) for group in groups
    }
    errors = st.floats(0, 100) | st.sampled_from([0.0, 1.0, 2.0])
    return (
        {group: {name: draw(errors) for name in names[group]} for group in groups},
        {group: {name: draw(st.integers(1, 50)) for name in names[group]} for group in groups},
    )


def total(choice: dict[str, str], table: Table | Sizes) -> float:
    return sum(table[group][name] for group, name in choice.items())


def smallest(sizes: Sizes) -> int:
    return sum(min(known.values()) for known in sizes.values())


@given(tables(), st.integers(0, 100), st.integers(0, 100))
def test_budget_is_kept_and_more_budget_never_hurts(
    table: tuple[Table, Sizes], extra: int, more: int
) -> None:
    sensitivity, sizes = table
    budget = smallest(sizes) + extra
    choice = choose_mixed(sensitivity, sizes, budget)
    assert choice.keys() == sensitivity.keys()
    assert total(choice, sizes) <= budget
    wider = choose_mixed(sensitivity, sizes, budget + more)
    assert total(wider, sensitivity) <= total(choice, sensitivity) + 1e-9


@given(tables())
def test_with_all_the_room_there_is_every_group_has_its_least_error(
    table: tuple[Table, Sizes],
) -> None:
    sensitivity, sizes = table
    choice = choose_mixed(sensitivity, sizes, 10_000)
    for group, name in choice.items():
        assert sensitivity[group][name] == min(sensitivity[group].values())


@given(tables(), st.integers(0, 100))
def test_close_to_the_best_choice_there_is(table: tuple[Table, Sizes], extra: int) -> None:
    """Greedy loses at most the gain of the one step that did not fit any more."""
    sensitivity, sizes = table
    budget = smallest(sizes) + extra
    found = total(choose_mixed(sensitivity, sizes, budget), sensitivity)
    every = (
        dict(zip(sizes, names, strict=True))
        for names in product(*(sizes[group] for group in sizes))
    )
    best = min(total(choice, sensitivity) for choice in every if total(choice, sizes) <= budget)
    steps = [max(errors.values()) - min(errors.values()) for errors in sensitivity.values()]
    assert best - 1e-9 <= found <= best + max(steps) + 1e-9


def test_gain_per_byte_decides() -> None:
    sensitivity = {"a": {"int4": 9.0, "int8": 1.0}, "b": {"int4": 5.0, "int8": 1.0}}
    sizes = {"a": {"int4": 10, "int8": 20}, "b": {"int4": 2, "int8": 4}}
    # b gains 4 for 2 bytes, a 8 for 10.
    assert choose_mixed(sensitivity, sizes, 12) == {"a": "int4", "b": "int4"}
    assert choose_mixed(sensitivity, sizes, 21) == {"a": "int4", "b": "int8"}
    assert choose_mixed(sensitivity, sizes, 24) == {"a": "int8", "b": "int8"}


def test_a_format_that_costs_more_and_is_no_better_is_never_taken() -> None:
    sensitivity = {"a": {"int4": 1.0, "int8": 1.0, "bf16": 2.0}}
    sizes = {"a": {"int4": 1, "int8": 2, "bf16": 4}}
    assert choose_mixed(sensitivity, sizes, 100) == {"a": "int4"}


def test_budget_out_of_reach_names_the_least_there_is() -> None:
    sizes = {"a": {"int4": 600, "int8": 1200}, "b": {"int4": 634, "int8": 1200}}
    sensitivity = {group: {"int4": 1.0, "int8": 0.5} for group in sizes}
    with pytest.raises(ExportError, match="1,000 bytes.*1,234; raise"):
        choose_mixed(sensitivity, sizes, 1000)


def test_tables_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="of b must be known"):
        choose_mixed({"a": {"int4": 1.0}}, {"a": {"int4": 1}, "b": {"int4": 1}}, 10)
    with pytest.raises(ValueError, match="of a must be known"):
        choose_mixed({"a": {"int4": 1.0, "int8": 0.5}}, {"a": {"int4": 1}}, 10)
    with pytest.raises(ValueError, match="not all finite"):
        choose_mixed({"a": {"int4": float("nan")}}, {"a": {"int4": 1}}, 10)


def test_groups_cover_the_decoder_and_sizes_are_those_stored() -> None:
    spec = ModelSpec.from_hf_config(tiny_configs()["int4"].to_dict())
    groups = layer_groups(spec)
    shapes = decoder_linear_shapes(spec)
    assert sorted(name for names in groups.values() for name in names) == sorted(shapes)
    candidates = {"int4": INT4, "int8-weight-only": INT8_WEIGHT_ONLY, "bf16": None}
    sizes = group_bytes(spec, dict.fromkeys(groups, candidates))
    rows, columns = shapes["model.layers.1.mlp.down_proj"]
    assert sizes["model.layers.1.down"] == {
        "int4": rows * columns // 2 + rows * (columns // 128) * 2 + 16,
        "int8-weight-only": rows * columns + rows * 2,
        "bf16": rows * columns * 2,
    }
