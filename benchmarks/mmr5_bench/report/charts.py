"""Charts over two measures: how times are distributed, and quality against time.

Pure functions from data to SVG; empty data gives an empty string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmr5_bench.evidence.statistics import Interval
from mmr5_bench.report.scales import Scale, is_number, number, tick_label, time_scale
from mmr5_bench.report.svg import (
    SERIES,
    fitted,
    frame,
    label,
    line,
    marker,
    path,
    text_width,
)

NARROW = 480.0
_DIRECT = 8
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """Time (ms) and quality (0 to 1) of a subject under ``name``, each with its interval."""

    subject: str
    name: str
    time: Interval
    quality: Interval
    series: int = 0


def ecdf_chart(series: Sequence[tuple[str, Sequence[float]]], width: float, title: str) -> str:
    """Share of requests answered within a time, one step curve per (name, samples in ms)."""
    drawn = [(n, sorted(float(v) for v in s if is_number(v) and v >= 0)) for n, s in series]
    drawn = [(name, values) for name, values in drawn if values][:SERIES]
    if not drawn:
        return ""
    parts: list[str] = []
    columns = (width - 74, width)
    for x, text in zip(columns, ("p50", "p95, ms"), strict=True):
        parts.append(label(x, 13, text, anchor="end", size=11, class_="tick"))
    for index, (name, values) in enumerate(drawn):
        y = 22.0 + 20 * index
        parts.append(line(0, y + 8, 26, y + 8, f"curve s{index}"))
        parts.append(label(36, y + 12, name, room=width - 186))
        for x, share in zip(columns, (0.5, 0.95), strict=True):
            text = number(_quantile(values, share))
            parts.append(label(x, y + 12, text, anchor="end", class_="value"))
    top = 22.0 + 20 * len(drawn) + 18
    left, right, bottom = 40.0, width - 8, top + (200 if width < NARROW else 250)
    scale = time_scale([v for _, values in drawn for v in values], left, right)
    rise = Scale(0, 1, bottom, top)
    for share in (0, 0.25, 0.5, 0.75, 0.95, 1):
        y = rise(share)
        guide = share in (0.5, 0.95)
        parts.append(line(left, y, right, y, "guide" if guide else "grid"))
        # 95 and 100 % are too close for both to be written; the one people ask for is.
        if share != 1:
            text = f"{100 * share:.0f} %"
            parts.append(label(left - 7, y + 4, text, anchor="end", size=11, class_="tick"))
    parts.append(_time_axis(scale, bottom, width, "ms per request"))
    for index, (_, values) in enumerate(drawn):
        points = [(scale(values[0]), bottom)]
        for place, value in enumerate(values):
            x = scale(value)
            points.append((x, rise(place / len(values))))
            points.append((x, rise((place + 1) / len(values))))
        parts.append(path(points, f"curve s{index}"))
    described = "; ".join(
        f"{n}: p50 {number(_quantile(v, 0.5))}, p95 {number(_quantile(v, 0.95))} ms"
        for n, v in drawn
    )
    return frame(width, bottom + 36, title, f"Cumulative distribution. {described}", parts)


def pareto_chart(points: Sequence[Point], width: float, title: str, metric: str) -> str:
    """Quality against p95 with both intervals; the line joins what nothing else beats in both."""
    points = [p for p in points if _is_interval(p.time) and _is_interval(p.quality)]
    points = [p for p in points if p.time["value"] > 0]
    if not points:
        return ""
    shown = {p.subject: p.series for p in points}
    # A subject that is there once can be named where it is; many such names would cover the plot.
    alone = len(shown) == len(points)
    direct = alone and len(points) <= _DIRECT
    key, top = ("", 0.0) if direct else _subjects(shown, width)
    left, right, top = 44.0, width - 12, top + 26
    bottom = top + (260 if width < NARROW else 320)
    times = [p.time[end] for p in points for end in ("low", "value", "high")]
    across = time_scale(times, left, right)
    low = min(p.quality["low"] for p in points)
    high = max(p.quality["high"] for p in points)
    margin = max(0.08 * (high - low), 0.01)
    rise = Scale(max(0.0, low - margin), min(1.0, high + margin), bottom, top)
    if rise.low >= rise.high:
        rise = Scale(low - margin, high + margin, bottom, top)
    parts = [key, label(0, top - 12, f"{metric}, %", size=11, class_="tick")]
    for tick in rise.ticks(5):
        y = rise(tick)
        parts.append(line(left, y, right, y, "grid"))
        text = f"{100 * tick:.4g}"
        parts.append(label(left - 7, y + 4, text, anchor="end", size=11, class_="tick"))
    parts.append(_time_axis(across, bottom, width, "p95, ms; faster is left"))
    best = frontier([(p.time["value"], p.quality["value"]) for p in points])
    steps: list[tuple[float, float]] = []
    for time, quality in best:
        x, y = across(time), rise(quality)
        steps += [(x, steps[-1][1]), (x, y)] if steps else [(x, y)]
    parts.append(path([*steps, (right, steps[-1][1])], "frontier"))
    taken: list[Box] = [
        (across(p.time["value"]) - 7, rise(p.quality["value"]) - 7)
        + (across(p.time["value"]) + 7, rise(p.quality["value"]) + 7)
        for p in points
    ]
    for point in points:
        x, y = across(point.time["value"]), rise(point.quality["value"])
        ends = across(point.time["low"]), across(point.time["high"])
        parts.append(line(ends[0], y, ends[1], y, f"cross s{point.series % SERIES}"))
        up, down = rise(point.quality["high"]), rise(point.quality["low"])
        parts.append(line(x, up, x, down, f"cross s{point.series % SERIES}"))
    for point in points:
        x, y = across(point.time["value"]), rise(point.quality["value"])
        words = f"{point.subject} {point.name}: p95 {number(point.time['value'])} ms, "
        words += f"{metric} {100 * point.quality['value']:.1f} %"
        parts.append(marker(x, y, point.series, words))
        name = point.subject if direct else "" if alone else point.name
        parts.append(_beside(name, x, y, (left, top, right, bottom), taken))
    described = "; ".join(
        f"{p.subject} {p.name}: {number(p.time['value'])} ms, {100 * p.quality['value']:.1f} %"
        for p in points
    )
    return frame(width, bottom + 36, title, f"{metric} against p95. {described}", parts)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (time, quality) those that no other is both faster and better than, fastest first."""
    kept: list[tuple[float, float]] = []
    for time, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or quality > kept[-1][1]:
            kept.append((time, quality))
    return kept


def _subjects(shown: Mapping[str, int], width: float) -> tuple[str, float]:
    """Markers with names, in rows; and where the next thing may begin."""
    parts, x, y = [], 0.0, 0.0
    for subject, series in shown.items():
        wide = 18 + text_width(subject) + 16
        if x and x + wide > width:
            x, y = 0.0, y + 20
        parts.append(marker(x + 7, y + 9, series))
        parts.append(label(x + 18, y + 13, subject, room=width - x - 18))
        x += wide
    return "".join(parts), y + 22


def _time_axis(scale: Scale, bottom: float, width: float, unit: str) -> str:
    parts = [line(scale.start, bottom, scale.end, bottom, "axis")]
    room = 0.0
    for tick in scale.ticks(4 if width < NARROW else 7):
        x, text = scale(tick), tick_label(tick)
        half = text_width(text, 11) / 2
        parts.append(line(x, bottom, x, bottom + 4, "axis"))
        if x - half >= room and x + half <= width:
            parts.append(label(x, bottom + 17, text, anchor="middle", size=11, class_="tick"))
            room = x + half + 6
    words = f"{unit}, logarithmic" if scale.log else unit
    parts.append(label(scale.end, bottom + 32, words, anchor="end", size=11, class_="tick"))
    return "".join(parts)


def _beside(name: str, x: float, y: float, area: Box, taken: list[Box]) -> str:
    """The name at the first place that is free; nowhere when there is none (the tooltip has it)."""
    left, top, right, bottom = area
    shown = fitted(name, min(190.0, 0.5 * (right - left)), 11)
    wide = text_width(shown, 11)
    if not shown:
        return ""
    for distance in (0.0, 14.0, 28.0, 42.0):
        for dx, dy in (
            (10.0, -6.0 - distance),
            (10.0, 15.0 + distance),
            (-10.0 - wide, -6.0 - distance),
            (-10.0 - wide, 15.0 + distance),
        ):
            box = (x + dx, y + dy - 10, x + dx + wide, y + dy + 3)
            inside = box[0] >= left and box[2] <= right and box[1] >= top and box[3] <= bottom
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                return label(box[0], y + dy, name, room=wide + 1, size=11, class_="point")
    return ""


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _quantile(ordered: Sequence[float], share: float) -> float:
    """By interpolation, as numpy's default."""
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] * (1 - (at - below)) + ordered[above] * (at - below)


def _is_interval(interval: object) -> bool:
    return isinstance(interval, dict) and all(
        is_number(interval.get(key)) for key in ("value", "low", "high")
    )
