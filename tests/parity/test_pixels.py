"""Pixel values and sizes, bit for bit those of transformers' Pillow image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.pictures import noise
from mmr5_runtime.image import CELL_PIXELS, PixelBudget, planned_tokens, preprocess, smart_resize
from mmr5_runtime.types import PageError

reference = pytest.importorskip(
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
    reason="transformers is the reference here",
)

# What the reference's page loader makes of sides under half a cell, worked out by hand: there
# alone its rounding differs from the image processor's.
THIN = {
    (1, 1): (56, 56),
    (14, 792): (28, 784),
    (792, 14): (784, 28),
    (13, 100): (28, 112),
    (3, 500): (28, 504),
}
SIZES = [
    *THIN,
    (28, 28),
    (56, 84),
    (101, 77),
    (30, 3000),
    (1999, 21),
    (640, 480),
    (333, 1001),
]
BUDGETS = [
    PixelBudget(),
    PixelBudget(CELL_PIXELS, CELL_PIXELS),
    PixelBudget(CELL_PIXELS, 20 * CELL_PIXELS),
    PixelBudget(max_pixels=100_000),
    PixelBudget(300 * CELL_PIXELS, 400 * CELL_PIXELS),
]


def load(image: Image.Image) -> Image.Image:
    """The page loader's resize, with Pillow's default filter."""
    if image.size in THIN:
        return image.resize(THIN[image.size])
    height, width = reference.smart_resize(
        image.height, image.width, 28, 4 * 28 * 28, 16384 * 28 * 28
    )
    return image.resize((width, height))


def assert_same(image: Image.Image, budget: PixelBudget, processor: Any, **ours: Any) -> None:
    expected = processor(load(image), return_tensors="pt")
    patched = preprocess(image, budget, **ours)
    assert [list(patched.grid)] == expected["image_grid_thw"].tolist()
    assert patched.pixel_values.dtype == torch.float32
    assert torch.equal(patched.pixel_values, expected["pixel_values"])


def processor_of(budget: PixelBudget, **options: Any) -> Any:
    return reference.Qwen2VLImageProcessorPil(
        min_pixels=budget.min_pixels, max_pixels=budget.max_pixels, **options
    )


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: f"max{budget.max_pixels}")
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_pixel_values_are_equal(size: tuple[int, int], budget: PixelBudget) -> None:
    assert_same(noise(*size), budget, processor_of(budget))


def test_a_page_over_the_loaders_limit_is_resized_twice() -> None:
    budget = PixelBudget(max_pixels=100 * CELL_PIXELS)
    assert_same(noise(4000, 3400), budget, processor_of(budget))


def test_every_byte_value_is_normalised_alike_in_every_channel() -> None:
    ramp = Image.frombytes("L", (448, 448), bytes(x % 256 for x in range(448 * 448)))
    bands = [
        ramp.transpose(step) for step in (Image.Transpose.ROTATE_90, Image.Transpose.TRANSPOSE)
    ]
    assert_same(Image.merge("RGB", [ramp, *bands]), PixelBudget(), processor_of(PixelBudget()))


@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": 16},
        {"patch_size": 14, "merge_size": 4},  # 784x28 rounds to no row of cells, then to 336x56
        {"temporal_patch_size": 1},
        {"patch_size": 7, "merge_size": 3, "temporal_patch_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(200, 130), (784, 28)], ids=lambda size: "x".join(map(str, size)))
def test_other_patch_settings(size: tuple[int, int], options: dict[str, int]) -> None:
    budget = PixelBudget()
    assert_same(noise(*size), budget, processor_of(budget, **options), **options)


def test_other_mean_and_std() -> None:
    mean, std = (0.1, 0.25, 0.7), (0.5, 0.3, 1.0)
    processor = processor_of(PixelBudget(), image_mean=list(mean), image_std=list(std))
    assert_same(noise(90, 60), PixelBudget(), processor, mean=mean, std=std)


def test_max_pixels_acts_like_the_processors_load_option(tmp_path: Path) -> None:
    reference.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056).save_pretrained(
        tmp_path
    )
    processor = reference.Qwen2VLImageProcessorPil.from_pretrained(tmp_path, max_pixels=50_000)
    assert_same(noise(640, 480), PixelBudget(max_pixels=50_000), processor)


@given(st.integers(15, 9000), st.integers(15, 9000), st.integers(4, 16384))
@settings(max_examples=500)
def test_sizes_are_equal(height: int, width: int, cells: int) -> None:
    options = {"factor": 28, "min_pixels": 3136, "max_pixels": cells * CELL_PIXELS}
    try:
        expected = reference.smart_resize(height, width, **options)
    except ValueError:
        with pytest.raises(PageError):
            smart_resize(height, width, **options)
        return
    assert smart_resize(height, width, **options) == expected


@given(st.integers(1, 128), st.integers(1, 128), st.integers(1, 4000))
@settings(max_examples=300)
def test_token_counts_are_equal(rows: int, columns: int, cells: int) -> None:
    width, height = columns * 28, rows * 28
    if width * height < 3136:
        return
    budget = PixelBudget(CELL_PIXELS, cells * CELL_PIXELS)
    patches = processor_of(budget).get_number_of_image_patches(height, width)
    assert planned_tokens(width, height, budget) * 4 == patches


def test_a_strip_fails_in_the_second_resize_as_in_the_reference() -> None:
    image = noise(8200, 41)
    with pytest.raises(ValueError, match="aspect ratio"):
        processor_of(PixelBudget())(load(image), return_tensors="pt")
    with pytest.raises(PageError, match="8200x41"):
        preprocess(image, PixelBudget())
