"""Sizes, budgets and token counts, against exact integer arithmetic."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.pictures import noise
from mmr5_runtime.image import (
    CELL_PIXELS,
    PixelBudget,
    fitting_max_pixels,
    planned_sizes,
    planned_tokens,
    preprocess,
    preprocess_bytes,
    smart_resize,
)
from mmr5_runtime.types import PageError, RequestError

sides = st.integers(1, 6000)
# Thin pages may leave the allowed ratio while they are rounded; 60 is far from that.
page_sizes = st.tuples(sides, sides).filter(lambda size: max(size) <= 60 * min(size))
budgets = st.tuples(st.integers(1, 600), st.integers(0, 20000)).map(
    lambda cells: PixelBudget(cells[0] * CELL_PIXELS, (cells[0] + cells[1]) * CELL_PIXELS)
)


def half_even(value: int, factor: int) -> int:
    cells, rest = divmod(value, factor)
    return cells + (2 * rest > factor or (2 * rest == factor and cells % 2 == 1))


def exact_cells(side: int, other: int, pixels: int, factor: int) -> tuple[int, bool]:
    """Floor of sqrt(side / other * pixels) / factor, and whether that is a whole number."""
    top, bottom = side * pixels, other * factor * factor
    cells = math.isqrt(top // bottom)
    return cells, cells * cells * bottom == top


@given(sides, sides, st.sampled_from([16, 28, 32]), budgets)
@settings(max_examples=600)
def test_smart_resize_agrees_with_exact_arithmetic(
    height: int, width: int, factor: int, budget: PixelBudget
) -> None:
    low, high = budget.min_pixels, budget.max_pixels
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(PageError, match=f"{width}x{height}"):
            smart_resize(height, width, factor, low, high)
        return
    sizes = smart_resize(height, width, factor, low, high)
    plain = [max(1, half_even(side, factor)) * factor for side in (height, width)]
    for size, kept, side, other in zip(sizes, plain, (height, width), (width, height), strict=True):
        if math.prod(plain) > high:
            cells, whole = exact_cells(side, other, high, factor)
            # On a whole number the reference's floats may land just below it.
            allowed = {cells, cells - 1} if whole else {cells}
            assert size in {max(1, count) * factor for count in allowed}
        elif math.prod(plain) < low:
            cells, whole = exact_cells(side, other, low, factor)
            allowed = {cells, cells + 1} if whole else {cells + 1}
            assert size in {count * factor for count in allowed}
        else:
            assert size == kept


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1, 1, (56, 56)),  # below the minimum: enlarged
        (14, 792, (28, 784)),  # half a cell would round to none
        (42, 70, (56, 56)),  # 1.5 and 2.5 cells both round to even
        (3584, 3584, (3584, 3584)),  # exactly the maximum
        (7172, 7172, (3556, 3556)),  # 128 cells in exact arithmetic, 127 in the reference's floats
        (10, 2000, (28, 1988)),  # exactly 200 times as wide
    ],
)
def test_smart_resize_on_sizes_worked_out_by_hand(
    height: int, width: int, expected: tuple[int, int]
) -> None:
    assert smart_resize(height, width) == expected


def test_an_empty_side_is_an_error_and_not_a_division_by_zero() -> None:
    with pytest.raises(PageError, match="30x0 pixels is empty; pass one that has pixels"):
        smart_resize(0, 30)


def test_a_strip_error_names_size_and_remedy() -> None:
    with pytest.raises(PageError, match="2010x10 pixels .* 200 times the other; crop it or split"):
        smart_resize(10, 2010)


def test_a_strip_that_only_rounding_makes_too_thin_names_its_own_size() -> None:
    with pytest.raises(PageError, match="8200x41 pixels becomes 8204x28 .* crop it or split"):
        planned_sizes(8200, 41, PixelBudget())


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (783, 3136, "min_pixels=783 is less than one 28x28 cell; pass 784 or more"),
        (0, 0, "min_pixels=0 is less"),
        (-5, 3136, "min_pixels=-5 is less"),
        (784, 100, "max_pixels=100 is less"),
        (3136, 3135, "min_pixels=3136 exceeds max_pixels=3135; raise max_pixels or lower"),
        (3136.0, 4000, "min_pixels=3136.0 is not a whole number; pass a pixel count"),
        (3136, True, "max_pixels=True is not a whole number"),
    ],
)
def test_an_impossible_budget_is_refused(low: int, high: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PixelBudget(low, high)


def test_the_smallest_budget_is_one_cell() -> None:
    budget = PixelBudget(CELL_PIXELS, CELL_PIXELS)
    assert planned_tokens(500, 500, budget) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.min_pixels = 1  # type: ignore[misc]


@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), st.integers(4, 400))
@settings(max_examples=60)
def test_planned_tokens_are_the_tokens_made(size: tuple[int, int], cells: int) -> None:
    width, height = size
    if max(size) > 100 * min(size):
        return
    budget = PixelBudget(max_pixels=cells * CELL_PIXELS)
    patched = preprocess(noise(width, height), budget)
    assert patched.num_tokens == planned_tokens(width, height, budget)
    assert (patched.resized, patched.source) == (planned_sizes(*size, budget)[1], size)
    assert patched.grid == (1, patched.resized[1] // 14, patched.resized[0] // 14)
    assert patched.pixel_values.shape == (math.prod(patched.grid), 3 * 2 * 14 * 14)
    assert patched.pixel_values.is_contiguous()


@given(st.lists(page_sizes, min_size=1, max_size=6), st.integers(0, 40000), budgets)
@settings(max_examples=200)
def test_fitting_max_pixels_is_the_largest_that_fits(
    sizes: list[tuple[int, int]], allowance: int, budget: PixelBudget
) -> None:
    def total(max_pixels: int) -> int:
        candidate = PixelBudget(budget.min_pixels, max_pixels)
        return sum(planned_tokens(width, height, candidate) for width, height in sizes)

    found = fitting_max_pixels(sizes, allowance, budget)
    if found is None:
        assert total(budget.min_pixels) > allowance
        return
    assert found % CELL_PIXELS == 0
    assert budget.min_pixels <= found <= budget.max_pixels
    assert total(found) <= allowance
    if found < budget.max_pixels:
        assert total(found + CELL_PIXELS) > allowance


def test_fitting_max_pixels_for_a_budget_between_cells() -> None:
    found = fitting_max_pixels([(2000, 2000)] * 3, 900, PixelBudget(3137, 1_000_000))
    assert found is not None and found % CELL_PIXELS == 0
    assert 3 * planned_tokens(2000, 2000, PixelBudget(3137, found)) <= 900


def test_only_rgb_is_preprocessed() -> None:
    with pytest.raises(PageError, match="mode L is not RGB; pass it through open_page"):
        preprocess(Image.new("L", (30, 30)), PixelBudget())


def test_preprocess_leaves_the_image_alone() -> None:
    image = noise(50, 70)
    before = image.tobytes()
    preprocess(image, PixelBudget())
    assert image.size == (50, 70) and image.tobytes() == before


@given(
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    patches=st.sampled_from([(14, 2, 2), (8, 3, 1), (4, 1, 3)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_bytes_and_tables_give_the_very_pixel_values(
    size: tuple[int, int], patches: tuple[int, int, int], seed: int
) -> None:
    image = noise(*size, seed=seed)
    names = ("patch_size", "merge_size", "temporal_patch_size")
    layout = dict(zip(names, patches, strict=True))
    budget = PixelBudget(CELL_PIXELS, 40 * CELL_PIXELS)
    wanted = preprocess(image, budget, **layout, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    found = preprocess_bytes(image, budget, **layout, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert found.grid == wanted.grid
    assert found.patches.dtype == torch.uint8 and found.patches.is_contiguous()
    pixel_values = found.pixel_values(torch.device("cpu"))
    assert pixel_values.dtype == torch.float32 and pixel_values.is_contiguous()
    assert torch.equal(pixel_values, wanted.pixel_values)


def test_bytes_of_an_image_that_is_not_rgb_are_refused() -> None:
    with pytest.raises(PageError, match="mode L is not RGB"):
        preprocess_bytes(noise(40, 40).convert("L"), PixelBudget())
