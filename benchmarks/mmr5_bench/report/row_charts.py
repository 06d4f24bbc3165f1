"""Charts with one row per entry: times with intervals, stages, shares of a floor, ratios.

On a phone the name of a row stands above it, otherwise before it. All are pure functions from data
to SVG; empty data gives an empty string, so that a section without data is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mmr5_bench.evidence.statistics import Interval
from mmr5_bench.report.scales import (
    Scale,
    is_number,
    milliseconds,
    number,
    percent,
    ratio,
    tick_label,
    time_scale,
)
from mmr5_bench.report.svg import clean, element, frame, label, legend, line, text_width

NARROW = 480.0
AXIS = 34.0
WIDE_ROW, NARROW_ROW = 26.0, 42.0
_RATIO_TICKS = (0.25, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Rows:
    """Where the rows of a chart lie: the plot is ``left`` .. ``right``, rows from ``top`` on."""

    width: float
    top: float
    left: float
    right: float
    step: float
    count: int

    @property
    def bottom(self) -> float:
        """Below the last row."""
        return self.top + self.count * self.step

    @property
    def height(self) -> float:
        """Of the whole drawing, the axis included."""
        return self.bottom + AXIS

    def middle(self, index: int) -> float:
        """Where the bar or dot of a row is centred."""
        return self.top + index * self.step + (30 if self.width < NARROW else self.step / 2)

    def name(self, index: int, text: str) -> str:
        """The row's name, cut to its room."""
        y = self.top + index * self.step
        if self.width < NARROW:
            return label(0, y + 16, text, room=self.width - 4)
        return label(0, y + self.step / 2 + 4, text, room=self.left - 14)

    def axis(self, scale: Scale, unit: str, show: Callable[[float], str] = tick_label) -> str:
        """Grid lines, tick labels and the unit."""
        parts = []
        room = 2.0
        for tick in scale.ticks(4 if self.width < NARROW else 6):
            x, text = scale(tick), show(tick)
            parts.append(line(x, self.top, x, self.bottom, "grid"))
            half = text_width(text, 11) / 2
            if x - half >= room and x + half <= self.width:
                parts.append(
                    label(x, self.bottom + 15, text, anchor="middle", size=11, class_="tick")
                )
                room = x + half + 6
        parts.append(
            label(self.right, self.bottom + 30, unit, anchor="end", size=11, class_="tick")
        )
        return "".join(parts)


def arrange(names: Sequence[str], values: Sequence[str], width: float, top: float) -> Rows:
    """Room for the longest name (up to 44 % of the width) and the longest value behind it."""
    behind = max((text_width(value) for value in values), default=0.0) + 10
    if width < NARROW:
        return Rows(width, top, 6, width - behind, NARROW_ROW, len(names))
    before = min(max((text_width(name) for name in names), default=0.0) + 18, 0.44 * width)
    return Rows(width, top, before, width - behind, WIDE_ROW, len(names))


def latency_chart(
    rows: Sequence[tuple[str, Mapping[str, Interval]]], width: float, title: str
) -> str:
    """p50 (dot) and p95 (diamond) of every (name, latency summary in ms), with their intervals."""
    rows = [(n, s) for n, s in rows if _is_interval(s.get("p50")) and _is_interval(s.get("p95"))]
    if not rows:
        return ""
    values = [f"{number(s['p50']['value'])} / {number(s['p95']['value'])}" for _, s in rows]
    key = element("circle", cx=7.0, cy=9.0, r=4.5, class_="mark s0") + label(18, 13, "p50")
    key += _diamond(63, 9) + label(74, 13, "p95") + label(112, 13, "with 95 % intervals")
    place = arrange([name for name, _ in rows], values, width, 28)
    ends = [s[k][e] for _, s in rows for k in ("p50", "p95") for e in ("low", "value", "high")]
    scale = time_scale(ends, place.left, place.right)
    parts = [key, place.axis(scale, "ms, logarithmic" if scale.log else "ms")]
    for index, ((name, summary), value) in enumerate(zip(rows, values, strict=True)):
        y = place.middle(index)
        p50, p95 = summary["p50"], summary["p95"]
        parts.append(place.name(index, name))
        parts.append(line(scale(p50["value"]), y, scale(p95["value"]), y, "link"))
        parts.append(line(scale(p50["low"]), y, scale(p50["high"]), y, "whisker s0"))
        parts.append(line(scale(p95["low"]), y, scale(p95["high"]), y, "whisker s1"))
        parts.append(element("circle", cx=scale(p50["value"]), cy=y, r=4.5, class_="mark s0"))
        parts.append(_diamond(scale(p95["value"]), y))
        parts.append(label(width, y + 4, value, anchor="end", class_="value"))
    described = "; ".join(f"{n}: {v} ms" for (n, _), v in zip(rows, values, strict=True))
    return frame(width, place.height, title, f"p50 and p95 per entry. {described}", parts)


def stage_chart(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    stages: Sequence[str],
    width: float,
    title: str,
) -> str:
    """Mean ms per request by stage, stacked; ``stages`` in the order they are passed through."""
    rows = [
        (name, {s: float(v[s]) for s in stages if is_number(v.get(s)) and v[s] > 0})
        for name, v in rows
    ]
    rows = [(name, values) for name, values in rows if values]
    if not rows:
        return ""
    shown = [stage for stage in stages if any(stage in values for _, values in rows)]
    key, top = legend([(f"stage-{stage}", stage.replace("_", " ")) for stage in shown], 0, 0, width)
    totals = [math.fsum(values.values()) for _, values in rows]
    texts = [milliseconds(total) for total in totals]
    place = arrange([name for name, _ in rows], texts, width, top + 4)
    # Lengths are compared here, so never logarithmic.
    scale = Scale(0, min(max(totals), 1e300), place.left, place.right)
    parts = [key, place.axis(scale, "ms per request, mean")]
    for index, (name, values) in enumerate(rows):
        y, at = place.middle(index), 0.0
        parts.append(place.name(index, name))
        for stage in shown:
            if stage not in values:
                continue
            start, at = scale(at), at + values[stage]
            tip = f"{stage.replace('_', ' ')}: {milliseconds(values[stage])}"
            parts.append(_bar(start, scale(at), y, f"stage-{stage}", tip))
        text_x = width if width < NARROW else min(scale(at) + 8, width)
        anchor = "end" if text_x + text_width(texts[index]) > width else "start"
        x = width if anchor == "end" else text_x
        parts.append(label(x, y + 4, texts[index], anchor=anchor, class_="value"))
    described = "; ".join(f"{n}: {t}" for (n, _), t in zip(rows, texts, strict=True))
    return frame(width, place.height, title, f"Stacked bars of stages. {described}", parts)


def share_chart(rows: Sequence[tuple[str, float, str]], width: float, title: str, unit: str) -> str:
    """(name, share of what the machine allows, words behind the bar); more than 1 is cut at 1."""
    rows = [row for row in rows if is_number(row[1]) and row[1] >= 0]
    if not rows:
        return ""
    texts = [f"{percent(share, 0)} {words}".strip() for _, share, words in rows]
    column = text_width("100 %") + 8
    place = arrange([row[0] for row in rows], [row[2] for row in rows], width - column, 6)
    place = replace(place, width=width)
    scale = Scale(0, 1, place.left, place.right)
    parts = [place.axis(scale, unit, lambda tick: f"{100 * tick:.0f}")]
    for index, (name, share, words) in enumerate(rows):
        y = place.middle(index)
        parts.append(place.name(index, name))
        parts.append(_bar(place.left, place.right, y, "track", ""))
        parts.append(_bar(place.left, scale(share), y, "s0", texts[index]))
        x = place.right + column
        parts.append(label(x, y + 4, percent(share, 0), anchor="end", class_="value"))
        parts.append(label(width, y + 4, words, anchor="end", size=11, class_="tick"))
    described = "; ".join(f"{n}: {t}" for (n, _, _), t in zip(rows, texts, strict=True))
    return frame(width, place.height, title, described, parts)


def ratio_chart(
    rows: Sequence[tuple[str, Interval, str]], allowed: float, width: float, title: str
) -> str:
    """(name, after / before, verdict): points with intervals about 1, and what is allowed."""
    rows = [row for row in rows if _is_interval(row[1]) and row[1]["low"] > 0]
    if not rows:
        return ""
    texts = [ratio(interval["value"]) for _, interval, _ in rows]
    place = arrange([row[0] for row in rows], texts, width, 6)
    reach = max(max(i["high"], 1 / i["low"]) for _, i, _ in rows)
    # A single wild interval would press all others together; it is cut at the edge.
    reach = min(max(reach, 1 + 2 * allowed, 1.1), 4.0)
    scale = Scale(1 / reach, reach, place.left, place.right, log=True)
    parts = []
    written = 0.0
    for tick in (t for t in _RATIO_TICKS if 1 / reach <= t <= reach):
        x, text = scale(tick), f"{tick:g}×"
        half = text_width(text, 11) / 2
        # 1 is always named: what comes before makes room for it.
        near_one = tick < 1 and x + half + 6 > scale(1) - text_width("1×", 11) / 2
        parts.append(line(x, place.top, x, place.bottom, "zero" if tick == 1 else "grid"))
        if x - half >= written and not near_one and x + half <= width:
            parts.append(label(x, place.bottom + 15, text, anchor="middle", size=11, class_="tick"))
            written = x + half + 6
    limit = scale(1 + allowed)
    parts.append(line(limit, place.top, limit, place.bottom, "limit"))
    unit = f"after / before; dashed: {100 * allowed:g} % slower"
    parts.append(label(place.right, place.bottom + 30, unit, anchor="end", size=11, class_="tick"))
    for index, (name, interval, verdict) in enumerate(rows):
        y = place.middle(index)
        low, value, high = (scale(interval[key]) for key in ("low", "value", "high"))
        parts.append(place.name(index, name))
        parts.append(line(low, y, high, y, f"whisker {verdict}"))
        inside = element("title", clean(f"{name}: {texts[index]}, {verdict}"))
        parts.append(element("circle", inside, cx=value, cy=y, r=4.5, class_=f"mark {verdict}"))
        parts.append(label(width, y + 4, texts[index], anchor="end", class_="value"))
    described = "; ".join(f"{n}: {t} {v}" for (n, _, v), t in zip(rows, texts, strict=True))
    return frame(width, place.height, title, described, parts)


def _bar(start: float, end: float, y: float, class_: str, tooltip: str) -> str:
    inside = element("title", clean(tooltip)) if tooltip else None
    wide = max(end - start, 0.0)
    return element("rect", inside, x=start, y=y - 7, width=wide, height=14, class_=f"bar {class_}")


def _diamond(x: float, y: float) -> str:
    points = f"{x:.2f},{y - 5.5:.2f} {x + 5.5:.2f},{y:.2f} {x:.2f},{y + 5.5:.2f} {x - 5.5:.2f},{y}"
    return element("polygon", points=points, class_="mark s1")


def _is_interval(interval: object) -> bool:
    return isinstance(interval, dict) and all(
        is_number(interval.get(key)) for key in ("value", "low", "high")
    )
