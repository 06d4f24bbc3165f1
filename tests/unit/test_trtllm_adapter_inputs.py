"""What a prompt becomes for the decoder engine, by properties and against plain arithmetic."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.trtllm_tiny import tiny_spec
from mmr5_runtime.image import REFERENCE_BUDGET
from mmr5_runtime.rope import Grid, TextRotary
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.trtllm import inputs
from mmr5_runtime.trtllm.inputs import (
    engine_inputs,
    extra_ids,
    fake_ids,
    followed_by,
    one_pad_per_page,
    page_extra_ids,
    rotary_table,
    vision_inputs,
)
from mmr5_runtime.trtllm.prompt import RunnerPrompt, ShownPage
from mmr5_runtime.types import RequestError

SPEC = tiny_spec(2)
MERGE = SPEC.vision.spatial_merge_size
TEXT = 5  # an id that is no image token
sides = st.integers(1, 4)
grids = st.lists(st.tuples(st.just(1), sides, sides), min_size=1, max_size=4)
keys = st.binary(min_size=32, max_size=32)


def page(key: bytes, merged: Grid) -> ShownPage:
    frames, rows, columns = merged
    grid = (frames, rows * MERGE, columns * MERGE)

    def embeddings() -> torch.Tensor:
        seed = torch.Generator().manual_seed(key[0])
        return torch.randn(rows * columns, SPEC.text.hidden_size, generator=seed)

    return ShownPage(key, grid, embeddings, lambda: Image.new("RGB", (28, 28)))


def prompt_of(keyed: Sequence[tuple[bytes, Grid]], spec: ModelSpec = SPEC) -> RunnerPrompt:
    ids = [TEXT] * 3
    for _, (frames, rows, columns) in keyed:
        ids += [spec.vision_start_token_id, *[spec.image_token_id] * (frames * rows * columns)]
        ids += [spec.vision_end_token_id]
    return RunnerPrompt([*ids, TEXT], [page(*one) for one in keyed], REFERENCE_BUDGET)


@given(keys, st.integers(1, 300))
def test_extra_ids_fit_64_bits_and_are_never_those_of_text(key: bytes, count: int) -> None:
    found = page_extra_ids(key, count)
    assert len(found) == count
    assert all(0 < number < 1 << 64 for number in found)
    assert found == page_extra_ids(key, count)
    assert found[: count // 2] == page_extra_ids(key, count // 2)


@given(keys, keys)
def test_other_pages_have_other_extra_ids(first: bytes, second: bytes) -> None:
    shared = set(page_extra_ids(first, 64)) & set(page_extra_ids(second, 64))
    assert bool(shared) == (first == second)


def test_extra_ids_are_the_same_in_another_process() -> None:
    code = "from mmr5_runtime.trtllm.inputs import page_extra_ids as f; print(f(bytes(32), 3))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(page_extra_ids(bytes(32), 3))


@given(st.lists(st.tuples(keys, st.tuples(st.just(1), sides, sides)), min_size=1, max_size=4))
def test_extra_ids_follow_the_page_and_not_its_place(keyed: list[tuple[bytes, Grid]]) -> None:
    prompt = prompt_of(keyed)
    found = extra_ids(prompt, SPEC)
    assert len(found) == len(prompt.token_ids)
    image = [token == SPEC.image_token_id for token in prompt.token_ids]
    assert [number != 0 for number in found] == image
    on_pages = iter(number for number in found if number)
    for key, (frames, rows, columns) in keyed:
        count = frames * rows * columns
        assert [next(on_pages) for _ in range(count)] == page_extra_ids(key, count)


@given(grids)
def test_image_tokens_are_numbered_behind_the_vocabulary(merged: list[Grid]) -> None:
    prompt = prompt_of([(bytes(32), grid) for grid in merged])
    found = fake_ids(prompt.token_ids, SPEC).tolist()
    fakes = [token for token in found if token >= SPEC.text.vocab_size]
    assert fakes == [SPEC.text.vocab_size + n for n in range(sum(h * w for _, h, w in merged))]
    for token, fake in zip(prompt.token_ids, found, strict=True):
        assert fake == token if token != SPEC.image_token_id else fake >= SPEC.text.vocab_size


@given(grids)
def test_rows_of_the_prompt_table_are_the_pages_in_order(merged: list[Grid]) -> None:
    prompt = prompt_of([(bytes([n]) * 32, grid) for n, grid in enumerate(merged)])
    made = engine_inputs(prompt, SPEC, 256)
    rows = made.input_ids[made.input_ids >= SPEC.text.vocab_size] - SPEC.text.vocab_size
    expected = torch.cat([page.embeddings() for page in prompt.pages])
    assert made.prompt_table.shape == (1, *expected.shape)
    assert torch.equal(made.prompt_table[0][rows.long()], expected)


@given(grids)
def test_rotary_table_by_plain_arithmetic(merged: list[Grid]) -> None:
    """Position by position as the model's authors describe it, angle by angle in doubles."""
    prompt = prompt_of([(bytes(32), grid) for grid in merged])
    made = engine_inputs(prompt, SPEC, 256)
    places: list[tuple[int, int, int]] = []
    position = 0
    shown = iter(merged)
    ids = list(prompt.token_ids)
    while ids:
        if ids[0] != SPEC.image_token_id:
            places.append((position, position, position))
            position += 1
            ids = ids[1:]
            continue
        _, rows, columns = next(shown)
        places += [
            (position, position + row, position + column)
            for row in range(rows)
            for column in range(columns)
        ]
        position += max(rows, columns)
        ids = ids[rows * columns :]
    text = SPEC.text
    axes = [axis for axis, size in enumerate(text.mrope_section) for _ in range(size)]
    table = made.rotary_cos_sin.view(256, text.head_dim // 2, 2)
    for number, place in enumerate([*places, (0, 0, 0)]):
        for pair, axis in enumerate(axes):
            angle = place[axis] * text.rope_theta ** (-2 * pair / text.head_dim)
            cos, sin = table[number, pair].tolist()
            assert math.isclose(cos, math.cos(angle), abs_tol=1e-5)
            assert math.isclose(sin, math.sin(angle), abs_tol=1e-5)
    assert made.position_deltas.tolist() == [[position - len(prompt.token_ids)]]


@given(grids, st.lists(st.sampled_from([TEXT, SPEC.image_token_id]), max_size=9))
def test_tokens_behind_a_prompt_are_text(merged: list[Grid], behind: list[int]) -> None:
    """As if they had been in the prompt, but for image tokens, which no page belongs to."""
    prompt = prompt_of([(bytes(32), grid) for grid in merged])
    alone = engine_inputs(prompt, SPEC, 256)
    table = alone.rotary_cos_sin.clone()
    found = followed_by(alone, behind, SPEC)
    longer = RunnerPrompt([*prompt.token_ids, *[TEXT] * len(behind)], prompt.pages, prompt.pixels)
    expected = engine_inputs(longer, SPEC, 256)
    count = len(prompt.token_ids)
    assert found.input_ids.tolist() == [*alone.input_ids.tolist(), *behind]
    assert found.extra_ids == expected.extra_ids and found.prompt_table is alone.prompt_table
    assert torch.equal(found.rotary_cos_sin, expected.rotary_cos_sin)
    assert torch.equal(found.position_deltas, expected.position_deltas)
    rows = slice(0, count * SPEC.text.head_dim)
    assert torch.equal(alone.rotary_cos_sin[0, rows], table[0, rows])
    assert len(alone.input_ids) == len(alone.extra_ids) == count


def test_angles_are_computed_for_the_tokens_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's table has 128 thousand positions, most of them behind any prompt."""
    computed = []

    class Watched(TextRotary):
        def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            computed.append(positions.shape[1])
            return super().forward(positions)

    monkeypatch.setattr(inputs, "TextRotary", Watched)
    prompt = prompt_of([(bytes(32), (1, 2, 2))])
    followed_by(engine_inputs(prompt, SPEC, 131072), [TEXT] * 3, SPEC)
    assert computed == [len(prompt.token_ids), 3]


def test_a_prompt_longer_than_the_table_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        rotary_table(torch.zeros(3, 9, dtype=torch.int64), SPEC, 8)


def test_pages_that_do_not_fill_their_image_tokens_are_refused() -> None:
    prompt = prompt_of([(bytes(32), (1, 2, 2))])
    short = RunnerPrompt(prompt.token_ids, [page(bytes(32), (1, 1, 2))], REFERENCE_BUDGET)
    with pytest.raises(RequestError, match="image tokens"):
        engine_inputs(short, SPEC, 64)


@given(grids)
def test_one_pad_per_page(merged: list[Grid]) -> None:
    prompt = prompt_of([(bytes(32), grid) for grid in merged])
    short = one_pad_per_page(prompt.token_ids, SPEC.image_token_id)
    assert short.count(SPEC.image_token_id) == len(merged)
    text = [token for token in prompt.token_ids if token != SPEC.image_token_id]
    assert [token for token in short if token != SPEC.image_token_id] == text


def test_vision_inputs_reach_every_patch_once() -> None:
    spec, grid = SPEC.vision, (1, 4 * MERGE, 5 * MERGE)
    count = math.prod(grid)
    found = vision_inputs(torch.zeros(count, spec.patch_dim), grid, spec)
    assert {name: len(value) for name, value in found.items() if value.shape[0] == count} == {
        name: count for name in ("pixels", "cos", "sin", "places")
    }
    patches = found["windows"][found["window_mask"].bool()]
    assert sorted(patches.tolist()) == list(range(count))
    assert torch.equal(found["windows"].flatten()[found["places"]], torch.arange(count))
