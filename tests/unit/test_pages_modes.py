"""Colour modes, sample depths, transparency and EXIF orientation."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.pictures import BLUE, GREEN, RED, WHITE, corners, quadrants
from mmr5_runtime.pages import open_page
from mmr5_runtime.types import PageError

# How a camera stores an upright page for each orientation.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(orientation: int) -> tuple[Image.Image, Image.Exif]:
    step = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return (quadrants() if step is None else quadrants().transpose(step)), exif


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    image, exif = stored(orientation)
    path = tmp_path / f"page.{suffix}"
    by_suffix: dict[str, Any] = {
        "webp": {"lossless": True},
        "tif": {"compression": "tiff_lzw"},
    }
    image.save(path, exif=exif, **by_suffix.get(suffix, {}))
    opened = open_page(path)
    assert opened.size == (40, 24)
    assert corners(opened) == [RED, GREEN, BLUE, WHITE]


def test_exif_orientation_of_a_jpeg_and_of_a_pil_image(tmp_path: Path) -> None:
    image, exif = stored(6)
    image.save(tmp_path / "page.jpg", exif=exif, quality=95)
    assert open_page(tmp_path / "page.jpg").size == (40, 24)
    with Image.open(tmp_path / "page.jpg") as lazy:
        assert open_page(lazy).size == (40, 24)
        assert lazy.size == (24, 40)  # the caller's image is not turned


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_unknown_orientation_leaves_the_page_as_stored(orientation: int) -> None:
    image = quadrants()
    image.getexif()[0x0112] = orientation
    assert open_page(image) is image


def test_damaged_exif_does_not_cost_the_page(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    quadrants().save(path, exif=b"Exif\x00\x00no tiff header at all")
    assert open_page(path).size == (40, 24)


def half_clear(mode: str) -> Image.Image:
    """Black everywhere, the right half fully transparent."""
    image = Image.new("LA", (40, 24), (0, 255))
    image.paste((0, 0), (20, 0, 40, 24))
    if mode == "PA":  # Pillow converts to it without the alpha
        palette = Image.new("P", image.size)
        palette.putalpha(image.getchannel("A"))
        return palette
    return image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "La", "RGBa"])
def test_alpha_is_laid_on_white(mode: str) -> None:
    image = half_clear(mode)
    assert image.mode == mode
    assert corners(open_page(image)) == [(0, 0, 0), WHITE, (0, 0, 0), WHITE]


def test_partial_alpha_has_the_bits_of_a_masked_paste() -> None:
    rng = np.random.default_rng(3)
    rgba = Image.fromarray(rng.integers(0, 256, (30, 30, 4), dtype=np.uint8))
    expected = Image.new("RGB", (30, 30), (255, 255, 255))
    expected.paste(rgba, mask=rgba.split()[3])  # the reference's way
    assert open_page(rgba).tobytes() == expected.tobytes()


def test_a_palette_and_its_transparent_entry(tmp_path: Path) -> None:
    palette = quadrants().quantize(4)
    palette.save(tmp_path / "plain.png")
    assert corners(open_page(tmp_path / "plain.png")) == [RED, GREEN, BLUE, WHITE]
    red = palette.getpixel((1, 1))
    for suffix in ("png", "gif"):
        palette.save(tmp_path / f"clear.{suffix}", transparency=red)
        assert corners(open_page(tmp_path / f"clear.{suffix}")) == [WHITE, GREEN, BLUE, WHITE]


def test_a_palette_with_an_alpha_table(tmp_path: Path) -> None:
    palette = Image.new("P", (40, 24))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(1, (20, 0, 40, 24))
    palette.save(tmp_path / "page.png", transparency=bytes([0, 255]))
    assert corners(open_page(tmp_path / "page.png")) == [WHITE, RED, WHITE, RED]


def test_a_colour_key(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "rgb.png", transparency=RED)
    assert corners(open_page(tmp_path / "rgb.png")) == [WHITE, GREEN, BLUE, WHITE]
    grey = Image.new("L", (40, 24), 7)
    grey.save(tmp_path / "grey.png", transparency=7)
    assert set(corners(open_page(tmp_path / "grey.png"))) == {WHITE}


def test_one_bit(tmp_path: Path) -> None:
    image = Image.new("1", (40, 24), 1)
    image.paste(0, (0, 0, 20, 24))
    for suffix in ("png", "tif"):
        image.save(tmp_path / f"page.{suffix}")
        expected = [(0, 0, 0), WHITE, (0, 0, 0), WHITE]
        assert corners(open_page(tmp_path / f"page.{suffix}")) == expected


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    quadrants().convert("CMYK").save(tmp_path / f"page.{suffix}", quality=95)
    found = np.array(corners(open_page(tmp_path / f"page.{suffix}")))
    assert np.abs(found - [RED, GREEN, BLUE, WHITE]).max() <= 12


@pytest.mark.parametrize("mode", ["L", "RGBX", "YCbCr", "HSV", "LAB"])
def test_the_other_modes_open(mode: str) -> None:
    opened = open_page(Image.new("L", (8, 8), 200).convert("RGB").convert(mode))
    assert opened.mode == "RGB"
    assert np.abs(np.asarray(opened).astype(int) - 200).max() <= 3


SIXTEEN = np.array([[0, 128, 129, 257, 32768, 65278, 65407, 65535]], dtype=np.uint16)
EIGHT = [0, 0, 1, 1, 128, 254, 255, 255]  # nearest v / 257


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(SIXTEEN).save(tmp_path / f"page.{suffix}")
    assert np.asarray(open_page(tmp_path / f"page.{suffix}"))[0, :, 0].tolist() == EIGHT


def test_sixteen_bits_in_a_32_bit_image() -> None:
    opened = open_page(Image.fromarray(SIXTEEN.astype(np.int32)))
    assert np.asarray(opened)[0, :, 1].tolist() == EIGHT


def test_a_grey_level_of_16_bits_marked_transparent() -> None:
    image = Image.fromarray(SIXTEEN)
    image.info["transparency"] = 128
    assert np.asarray(open_page(image))[0, :, 2].tolist() == [0, 255, *EIGHT[2:]]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 99.6, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0.0, 32768.0, 65535.0]], np.float32), [0, 128, 255]),
    ],
)
def test_deep_samples_follow_their_range(
    tmp_path: Path, samples: np.ndarray, expected: list[int]
) -> None:
    Image.fromarray(samples).save(tmp_path / "page.tif")
    assert np.asarray(open_page(tmp_path / "page.tif"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    "samples",
    [
        np.array([[0, 65536]], np.int32),
        np.array([[-1, 5]], np.int32),
        np.array([[0.0, np.nan]], np.float32),
        np.array([[0.0, np.inf]], np.float32),
    ],
)
def test_deep_samples_in_no_known_range_are_an_error(samples: np.ndarray) -> None:
    stream = io.BytesIO()
    Image.fromarray(samples).save(stream, "TIFF")
    with pytest.raises(PageError, match="page 1 .*samples from .* convert the page to 8 bits"):
        open_page(stream.getvalue(), index=0)
