"""Rotary positions: how they count, and what the rotation must keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.inputs import GRIDS, random_prompt
from helpers.tiny import tiny_pair
from mmr5_runtime.rope import Grid, TextRotary, apply_rotary, mrope_positions, vision_rotary
from mmr5_runtime.types import RequestError

SPEC = tiny_pair("three_heads")[1].spec
SIDES = st.integers(1, 9).map(lambda side: 2 * side)
PAGES = st.lists(st.tuples(st.just(1), SIDES, SIDES), max_size=4)


def test_one_page_by_hand() -> None:
    image, text = SPEC.image_token_id, 5
    ids = torch.tensor([text, text, *[image] * 6, text, text])
    positions, following = mrope_positions(ids, [(1, 4, 6)], SPEC)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert following == 7


def test_text_counts_the_same_on_all_axes() -> None:
    positions, following = mrope_positions([1, 2, 3], [], SPEC, start=10)
    assert positions.tolist() == [[10, 11, 12]] * 3
    assert following == 13
    empty, following = mrope_positions([], [], SPEC, start=4)
    assert (empty.shape, following) == ((3, 0), 4)


@settings(max_examples=40)
@given(grids=PAGES, seed=st.integers(0, 99))
def test_segments_continue_where_the_previous_one_ended(grids: list[Grid], seed: int) -> None:
    ids = random_prompt(SPEC, grids, seed)
    whole, end = mrope_positions(ids, grids, SPEC)
    # A segment ends behind every vision-end token, as the segments of a reranking prompt do.
    cuts = (ids == SPEC.vision_end_token_id).nonzero().flatten() + 1
    pieces, start = [], 0
    for segment, grid in zip(ids.tensor_split(cuts), [*grids, None], strict=True):
        piece, start = mrope_positions(segment, [] if grid is None else [grid], SPEC, start)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert start == end == int(whole.max()) + 1


@pytest.mark.parametrize(
    ("images", "grids", "words"),
    [
        (3, [], "3 image tokens but its 0 pages have 0"),
        (3, [(1, 4, 4)], "3 image tokens but its 1 pages have 4"),
        (8, [(1, 4, 4)], "8 image tokens but its 1 pages have 4"),
    ],
)
def test_image_tokens_and_grids_must_match(images: int, grids: list[Grid], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        mrope_positions([1, *[SPEC.image_token_id] * images, 2], grids, SPEC)


def test_a_page_interrupted_by_text_is_refused() -> None:
    image = SPEC.image_token_id
    ids = [*[image] * 4, 7, image, image, 7, image, image]
    with pytest.raises(RequestError, match="page 2 are interrupted"):
        mrope_positions(ids, [(1, 4, 4), (1, 4, 4)], SPEC)


@settings(max_examples=30)
@given(shift=st.integers(0, 5000), seed=st.integers(0, 99))
def test_scores_depend_on_differences_of_positions_only(shift: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rotary = TextRotary(SPEC.text)
    positions = torch.randint(0, 50, (3, 6), generator=generator)
    q, k = torch.randn(2, 6, 1, SPEC.text.head_dim, generator=generator)

    def scores(at: torch.Tensor) -> torch.Tensor:
        cos, sin = rotary(at)
        return apply_rotary(q, cos, sin).flatten(1) @ apply_rotary(k, cos, sin).flatten(1).T

    # fp32 angles of a few thousand radians are exact to about 3e-4.
    torch.testing.assert_close(scores(positions + shift), scores(positions), atol=1e-2, rtol=0)
    torch.testing.assert_close(
        apply_rotary(q, *rotary(positions)).norm(dim=-1), q.norm(dim=-1), atol=1e-5, rtol=1e-5
    )


def test_each_section_follows_its_own_axis() -> None:
    rotary = TextRotary(SPEC.text)
    base = torch.zeros(3, 1, dtype=torch.int64)
    first = 0
    for axis, size in enumerate(SPEC.text.mrope_section):
        moved = base.clone()
        moved[axis] = 3
        changed = (rotary(moved)[1] != rotary(base)[1])[0].nonzero().flatten().tolist()
        assert changed == list(range(first, first + size))
        first += size


@pytest.mark.parametrize("grid", GRIDS)
def test_vision_patches_come_in_merge_order(grid: Grid) -> None:
    _, rows, columns = grid
    cos, sin = vision_rotary(grid, SPEC.vision)
    quarter = SPEC.vision.head_dim // 4
    assert cos.shape == sin.shape == (rows * columns, 2 * quarter)
    # Frequency 0 is 1 radian per patch: the first column of each half is sin(row), sin(column).
    order = [
        (row + inner_row, column + inner_column)
        for row in range(0, rows, 2)
        for column in range(0, columns, 2)
        for inner_row in range(2)
        for inner_column in range(2)
    ]
    expected = torch.tensor(order, dtype=torch.float32).sin()
    torch.testing.assert_close(sin[:, [0, quarter]], expected)
