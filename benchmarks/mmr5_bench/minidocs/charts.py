"""Page bodies: one drawing function per page kind, on a canvas at twice the final resolution.

Every function takes the drawing context, the body box ``(left, top, right, bottom)`` in canvas
pixels, a style and a random generator, and draws data of random shape and colour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw, ImageFont

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]

FILLER = "the of and in total share rate since year by area per group data high low rise"
WORDS: tuple[str, ...] = tuple(FILLER.split())


@dataclass(frozen=True)
class Style:
    """Colours and fonts of one page; ``ink`` is readable on ``paper``."""

    paper: Color
    ink: Color
    accents: tuple[Color, ...]
    small_font: ImageFont.FreeTypeFont
    line_width: int


def draw_bar_chart(
    draw: ImageDraw.ImageDraw, box: Box, style: Style, rng: np.random.Generator
) -> None:
    """Vertical or horizontal bars of one to two series with axes."""
    left, top, right, bottom = box
    count, series = int(rng.integers(3, 7)), int(rng.integers(1, 3))
    horizontal = rng.random() < 0.3
    _axes(draw, box, style)
    extent = (bottom - top) if horizontal else (right - left)
    slot = extent / count
    for i in range(count):
        for s in range(series):
            length = rng.uniform(0.2, 0.95)
            start = (i + 0.15 + 0.7 * s / series) * slot
            stop = start + 0.65 * slot / series
            color = style.accents[s]
            if horizontal:
                draw.rectangle(
                    (left, top + start, left + length * (right - left), top + stop), fill=color
                )
            else:
                draw.rectangle(
                    (left + start, bottom - length * (bottom - top), left + stop, bottom),
                    fill=color,
                )


def draw_line_chart(
    draw: ImageDraw.ImageDraw, box: Box, style: Style, rng: np.random.Generator
) -> None:
    """One to three random walks over shared axes, sometimes with markers."""
    left, top, right, bottom = box
    _axes(draw, box, style)
    count = int(rng.integers(5, 10))
    for s in range(int(rng.integers(1, 4))):
        walk = np.cumsum(rng.normal(size=count))
        walk = (walk - walk.min()) / (np.ptp(walk) + 1e-6)
        xs = np.linspace(left + 4, right - 2, count)
        ys = bottom - (0.1 + 0.8 * walk) * (bottom - top)
        points = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
        draw.line(points, fill=style.accents[s], width=style.line_width + 2, joint="curve")
        if rng.random() < 0.4:
            for x, y in points:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=style.accents[s])


def draw_pie_chart(
    draw: ImageDraw.ImageDraw, box: Box, style: Style, rng: np.random.Generator
) -> None:
    """Three to six slices, a ring in a third of the pages, off-centre by chance."""
    left, top, right, bottom = box
    radius = 0.48 * min(right - left, bottom - top) * rng.uniform(0.8, 1.0)
    slack = max(0.0, (right - left) / 2 - radius)
    cx = (left + right) / 2 + rng.uniform(-slack, slack)
    cy = (top + bottom) / 2
    shares = rng.dirichlet(np.full(int(rng.integers(3, 7)), 2.0))
    angle = rng.uniform(0, 360)
    outer = (cx - radius, cy - radius, cx + radius, cy + radius)
    for i, share in enumerate(shares):
        color = style.accents[i % len(style.accents)]
        draw.pieslice(outer, angle, angle + 360 * share, fill=color, outline=style.paper)
        angle += 360 * share
    if rng.random() < 0.33:
        hole = radius * 0.5
        draw.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=style.paper)


def draw_scatter_plot(
    draw: ImageDraw.ImageDraw, box: Box, style: Style, rng: np.random.Generator
) -> None:
    """Twenty to fifty dots in one or two clouds."""
    left, top, right, bottom = box
    _axes(draw, box, style)
    for s in range(int(rng.integers(1, 3))):
        count = int(rng.integers(14, 30))
        x = rng.uniform(0.05, 0.95, count)
        y = np.clip(
            x * rng.uniform(-0.8, 0.8) + rng.uniform(0.2, 0.8) + rng.normal(0, 0.12, count),
            0.05,
            0.95,
        )
        size = rng.uniform(4, 6)
        for px, py in zip(left + x * (right - left), bottom - y * (bottom - top), strict=True):
            draw.ellipse((px - size, py - size, px + size, py + size), fill=style.accents[s])


def draw_table(draw: ImageDraw.ImageDraw, box: Box, style: Style, rng: np.random.Generator) -> None:
    """A grid of numbers under a shaded header row, with or without vertical rules."""
    left, top, right, bottom = box
    rows, columns = int(rng.integers(4, 7)), int(rng.integers(2, 5))
    height, width = (bottom - top) / rows, (right - left) / columns
    draw.rectangle((left, top, right, top + height), fill=style.accents[0])
    vertical = rng.random() < 0.6
    for r in range(rows + 1):
        y = top + r * height
        draw.line((left, y, right, y), fill=style.ink, width=style.line_width)
    for c in range(columns + 1):
        x = left + c * width
        if vertical or c in (0, columns):
            draw.line((x, top, x, bottom), fill=style.ink, width=style.line_width)
    for r in range(rows):
        for c in range(columns):
            text = WORDS[int(rng.integers(len(WORDS)))] if c == 0 else f"{rng.integers(10, 999)}"
            draw.text(
                (left + c * width + 6, top + (r + 0.2) * height),
                text,
                fill=style.paper if r == 0 else style.ink,
                font=style.small_font,
            )


def draw_text(draw: ImageDraw.ImageDraw, box: Box, style: Style, rng: np.random.Generator) -> None:
    """Running text in one or two columns, some lines indented or bulleted."""
    left, top, right, bottom = box
    columns = 2 if (right - left) > 260 and rng.random() < 0.4 else 1
    step = int(style.small_font.size * rng.uniform(1.2, 1.6))
    width = (right - left) / columns
    for c in range(columns):
        y = top
        while y + step <= bottom:
            x = left + c * width + (14 if rng.random() < 0.15 else 0)
            line, end = "", x
            while end < left + (c + 1) * width - 30:
                line += WORDS[int(rng.integers(len(WORDS)))] + " "
                end = x + draw.textlength(line, font=style.small_font)
                if rng.random() < 0.03:
                    break
            room = left + (c + 1) * width - 8 - x
            while line and draw.textlength(line, font=style.small_font) > room:
                line = line[:-1]
            draw.text((x, y), line, fill=style.ink, font=style.small_font)
            y += step


def _axes(draw: ImageDraw.ImageDraw, box: Box, style: Style) -> None:
    left, top, right, bottom = box
    draw.line((left, top, left, bottom), fill=style.ink, width=style.line_width)
    draw.line((left, bottom, right, bottom), fill=style.ink, width=style.line_width)


Drawer = Callable[[ImageDraw.ImageDraw, Box, Style, np.random.Generator], None]
DRAWERS: tuple[Drawer, ...] = (
    draw_bar_chart,
    draw_line_chart,
    draw_pie_chart,
    draw_scatter_plot,
    draw_table,
    draw_text,
)
