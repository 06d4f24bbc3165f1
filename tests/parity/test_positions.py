"""Position ids against transformers' own index, for any list of pages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_position_ids

from helpers.inputs import GRIDS, hf_inputs, random_prompt
from helpers.tiny import tiny_configs, tiny_pair
from mmr5_runtime.rope import Grid, TextRotary, mrope_positions, vision_rotary
from mmr5_runtime.spec import ModelSpec

SIDES = st.integers(1, 9).map(lambda side: 2 * side)
PAGES = st.lists(st.tuples(st.just(1), SIDES, SIDES), min_size=1, max_size=5)


def hf_index(name: str, ids: torch.Tensor, grids: list[Grid]) -> tuple[torch.Tensor, int]:
    """transformers' positions [3, T] and the position of the next token."""
    hf, ours = tiny_pair(name)
    inputs = hf_inputs(ours.spec, ids, [], grids)
    positions, delta = hf.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], torch.tensor(grids)
    )
    return positions[:, 0], len(ids) + int(delta)


def check(name: str, spec: ModelSpec, grids: list[Grid], seed: int) -> None:
    ids = random_prompt(spec, grids, seed)
    expected, following = hf_index(name, ids, grids)
    found, next_position = mrope_positions(ids, grids, spec)
    assert torch.equal(found, expected)
    assert next_position == following


@pytest.mark.parametrize("name", tiny_configs())
def test_pages_of_different_odd_sizes(name: str) -> None:
    check(name, tiny_pair(name)[1].spec, list(GRIDS), seed=0)


@settings(max_examples=60)
@given(grids=PAGES, seed=st.integers(0, 99))
def test_any_pages(grids: list[Grid], seed: int) -> None:
    check("three_heads", tiny_pair("three_heads")[1].spec, grids, seed)


@pytest.mark.parametrize("name", tiny_configs())
def test_decoder_rotation_tables(name: str) -> None:
    hf, ours = tiny_pair(name)
    ids = random_prompt(ours.spec, GRIDS)
    positions, _ = mrope_positions(ids, GRIDS, ours.spec)
    cos, sin = hf.model.language_model.rotary_emb(torch.zeros(1), positions[:, None])
    # transformers repeats the table for both halves of a head.
    found = torch.stack(TextRotary(ours.spec.text)(positions)).repeat(1, 1, 2)
    torch.testing.assert_close(found, torch.stack((cos[0], sin[0])), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", tiny_configs())
def test_vision_rotation_tables(name: str) -> None:
    hf, ours = tiny_pair(name)
    for grid in GRIDS:
        ids = get_vision_position_ids(torch.tensor([grid]), ours.spec.vision.spatial_merge_size)
        cos, sin = hf.model.visual.rotary_pos_emb(torch.zeros(1), ids)
        found = torch.stack(vision_rotary(grid, ours.spec.vision)).repeat(1, 1, 2)
        torch.testing.assert_close(found, torch.stack((cos, sin)), atol=1e-6, rtol=0)
