"""The vision tower against transformers, page by page."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_window_index

from helpers.inputs import GRIDS, random_pages
from helpers.tiny import tiny_configs, tiny_pair
from mmr5_runtime.rope import Grid
from mmr5_runtime.types import RequestError
from mmr5_runtime.vision import plan_windows

TOLERANCE = 1e-4
SIDES = st.integers(1, 13).map(lambda side: 2 * side)


@pytest.mark.parametrize("name", tiny_configs())
def test_embeddings_of_every_page(name: str) -> None:
    hf, ours = tiny_pair(name)
    pages = random_pages(ours.spec, GRIDS, seed=3)
    with torch.no_grad():
        expected = hf.model.get_image_features(torch.cat(pages), torch.tensor(GRIDS)).pooler_output
    for page, grid, reference in zip(pages, GRIDS, expected, strict=True):
        found = ours.visual(page, grid)
        assert found.shape == (len(page) // 4, ours.spec.text.hidden_size)
        assert (found - reference).abs().max() <= TOLERANCE


@settings(max_examples=15)
@given(rows=SIDES, columns=SIDES, seed=st.integers(0, 99))
def test_embeddings_of_any_grid(rows: int, columns: int, seed: int) -> None:
    hf, ours = tiny_pair("three_heads")
    grid = (1, rows, columns)
    [page] = random_pages(ours.spec, [grid], seed)
    with torch.no_grad():
        [expected] = hf.model.get_image_features(page, torch.tensor([grid])).pooler_output
    assert (ours.visual(page, grid) - expected).abs().max() <= TOLERANCE


@settings(max_examples=40)
@given(rows=SIDES, columns=SIDES)
def test_windows_hold_the_same_tokens(rows: int, columns: int) -> None:
    spec = tiny_pair("small_patches")[1].spec.vision
    order, bounds = get_vision_window_index(
        torch.tensor([(1, rows, columns)]),
        spatial_merge_size=spec.spatial_merge_size,
        window_size=spec.window_size,
        patch_size=spec.patch_size,
    )
    lengths = (bounds.diff() // spec.merge_unit).tolist()
    expected = {tuple(window.tolist()) for window in order.split(lengths)}

    plan = plan_windows((1, rows, columns), spec)
    lengths = [length // spec.merge_unit for count, length in plan.sizes for _ in range(count)]
    assert {tuple(window.tolist()) for window in plan.order.split(lengths)} == expected
    assert len(plan.sizes) <= 4


def test_a_page_does_not_change_with_its_company_or_its_repetition() -> None:
    _, ours = tiny_pair("int4")
    pages = random_pages(ours.spec, GRIDS, seed=4)
    alone = ours.visual(pages[2], GRIDS[2])
    for page, grid in zip(pages, GRIDS, strict=True):
        ours.visual(page, grid)
    assert torch.equal(ours.visual(pages[2], GRIDS[2]), alone)


@pytest.mark.parametrize(
    ("grid", "shape"),
    [
        ((1, 4, 4), (15, 1176)),
        ((1, 4, 4), (16, 588)),
        ((2, 4, 4), (32, 1176)),
        ((1, 3, 4), (12, 1176)),
        ((1, 0, 4), (0, 1176)),
    ],
    ids=["patches", "patch size", "frames", "odd rows", "empty"],
)
def test_pixels_that_do_not_belong_to_the_grid(grid: Grid, shape: tuple[int, int]) -> None:
    _, ours = tiny_pair("three_heads")
    with pytest.raises(RequestError, match="do not belong to a page of grid"):
        ours.visual(torch.zeros(shape), grid)
