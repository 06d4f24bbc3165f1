"""Synthetic pages: a headline naming the topic and a body of the kind, in varying style.

A page is a pure function of ``(topic, kind, seed)``. Page size and shape, typeface, weight and
size of the headline, its place, colours on light or dark paper, and the data of the body all vary;
skew, blur and sensor noise are added to some pages. Sizes come from short lists: reading at every
scale and offset takes a larger tower than one that trains on two CPU cores.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mmr5_bench.minidocs.charts import DRAWERS, Color, Style
from mmr5_bench.minidocs.vocabulary import TOPICS

SCALE = 2  # the canvas is drawn at twice the size and reduced, which smooths every edge
SIZES: tuple[tuple[int, int], ...] = (  # width, height of the page; the first is the plain one
    (168, 112),
    (112, 168),
    (140, 140),
    (140, 112),
    (112, 140),
    (168, 140),
)
TITLE_SIZES = (36, 40)  # on the canvas
FONT_FILES: tuple[str, ...] = (
    "DejaVuSans-Bold.ttf",
    "DejaVuSans.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif.ttf",
)
MARGIN = 12


def render_page(topic: int, kind: int, seed: int, *, variety: float = 1.0) -> Image.Image:
    """Draw one page; returns an RGB image of one of ``SIZES``.

    ``topic`` and ``kind`` index ``vocabulary.TOPICS`` and ``vocabulary.KINDS``; the same arguments
    give the same pixels wherever the same Pillow and font files are installed. ``variety`` is the
    chance that each aspect of the style departs from a plain one; below 1 it serves only to teach
    a vision tower to read before it meets the full range.
    """
    rng = np.random.default_rng([seed, topic, kind])
    width, height = _pick(SIZES, rng, variety)
    paper, ink, accents = _palette(rng, inverted=rng.random() < variety / 6)
    canvas = Image.new("RGB", (width * SCALE, height * SCALE), paper)
    draw = ImageDraw.Draw(canvas)
    style = Style(
        paper=paper,
        ink=ink,
        accents=accents,
        small_font=_font(FONT_FILES[int(rng.integers(4))], int(rng.integers(12, 17))),
        line_width=int(rng.integers(2, 4)),
    )
    title_height = _headline(draw, TOPICS[topic], canvas.width, style, rng, variety)
    top, bottom = MARGIN + title_height + 6, canvas.height - MARGIN
    if rng.random() < 0.15 * variety:  # headline at the foot: move the band down, body above it
        band = canvas.crop((0, 0, canvas.width, top))
        canvas.paste(paper, (0, 0, canvas.width, top))
        canvas.paste(band, (0, canvas.height - top))
        top, bottom = MARGIN, canvas.height - top
    DRAWERS[kind](draw, (MARGIN + 4, top, canvas.width - MARGIN, bottom), style, rng)
    return _scan(canvas, (width, height), rng, variety)


T = TypeVar("T")


def _pick(choices: Sequence[T], rng: np.random.Generator, variety: float) -> T:
    """The first choice, or with the chance ``variety`` any of them."""
    return choices[int(rng.integers(len(choices))) if rng.random() < variety else 0]


def _palette(rng: np.random.Generator, *, inverted: bool) -> tuple[Color, Color, tuple[Color, ...]]:
    """Light paper with dark ink, or the reverse; six accent colours."""
    light = rng.integers(225, 256, 3)
    dark = rng.integers(0, 60, 3)
    paper, ink = (dark, light) if inverted else (light, dark)
    low, high = (110, 250) if inverted else (20, 190)
    accents = rng.integers(low, high, (6, 3))
    return _rgb(paper), _rgb(ink), tuple(_rgb(color) for color in accents)


def _headline(
    draw: ImageDraw.ImageDraw,
    topic: str,
    width: int,
    style: Style,
    rng: np.random.Generator,
    variety: float,
) -> int:
    """Write the topic, smaller than drawn by chance if it does not fit; returns its height."""
    text = topic.capitalize()
    name, size = _pick(FONT_FILES, rng, variety), _pick(TITLE_SIZES, rng, variety)
    room = width - 2 * MARGIN
    while draw.textlength(text, font=_font(name, size)) > room:
        size -= 2
    font = _font(name, size)
    draw.text((MARGIN, 8), text, fill=style.ink, font=font)
    if rng.random() < 0.25:
        y = MARGIN + size + 4
        draw.line((MARGIN, y, width - MARGIN, y), fill=style.accents[5], width=3)
    return size + 8


def _scan(
    canvas: Image.Image, size: tuple[int, int], rng: np.random.Generator, variety: float
) -> Image.Image:
    """Reduce to the final size and add what scanners add: skew, blur, noise."""
    if rng.random() < 0.1 * variety:
        angle = float(rng.uniform(-1.0, 1.0))
        fill = canvas.getpixel((0, 0))
        canvas = canvas.rotate(angle, Image.Resampling.BILINEAR, fillcolor=fill)
    page = canvas.resize(size, Image.Resampling.BOX)
    if rng.random() < 0.2 * variety:
        page = page.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.6))))
    noise = rng.normal(0.0, variety * rng.uniform(0.0, 10.0), (size[1], size[0], 1))
    pixels = np.clip(np.asarray(page, dtype=np.float32) + noise, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _rgb(values: np.ndarray) -> Color:
    return int(values[0]), int(values[1]), int(values[2])


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_folder() / name), size)


@lru_cache(maxsize=1)
def font_folder() -> Path:
    """The DejaVu fonts that matplotlib carries, found without importing it."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "MiniDocs draws with the DejaVu fonts that come with matplotlib: "
            "pip install 'mmr5-runtime[bench]'"
        )
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
