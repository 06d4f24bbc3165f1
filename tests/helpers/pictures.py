"""Small pictures whose corners tell orientation and colour apart."""

from __future__ import annotations

import numpy as np
from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(width: int = 40, height: int = 24) -> Image.Image:
    """Red, green / blue, white: every flip and turn of it is different."""
    picture = Image.new("RGB", (width, height), WHITE)
    picture.paste(RED, (0, 0, width // 2, height // 2))
    picture.paste(GREEN, (width // 2, 0, width, height // 2))
    picture.paste(BLUE, (0, height // 2, width // 2, height))
    return picture


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB noise over a gradient: no two patches are alike and resampling matters."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 128, size=(height, width, 3), dtype=np.uint8)
    pixels += np.linspace(0, 127, width, dtype=np.uint8)[None, :, None]
    return Image.fromarray(pixels)


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Pixels near the top-left, top-right, bottom-left and bottom-right corner."""
    found = []
    for y in (1, image.height - 2):
        for x in (1, image.width - 2):
            pixel = image.getpixel((x, y))
            assert isinstance(pixel, tuple)
            found.append(tuple(int(value) for value in pixel))
    return found
