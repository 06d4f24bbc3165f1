"""Charts: always well-formed, always inside their frame, whatever the data is."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.evidence import interval
from mmr5_bench.evidence.statistics import Interval
from mmr5_bench.report.charts import Point, ecdf_chart, frontier, pareto_chart
from mmr5_bench.report.row_charts import latency_chart, ratio_chart, share_chart, stage_chart
from mmr5_bench.report.scales import (
    Scale,
    log_ticks,
    nice_ticks,
    number,
    percent,
    tick_label,
    time_scale,
    with_interval,
)
from mmr5_bench.report.svg import ADVANCE, fitted, text_width

WIDTHS = (350.0, 880.0)
LONG = 'rerank[pages=5] of a subject with "quotes", <tags> & an ending nobody will ever read' * 3
STAGES = ("preprocess", "vision", "prefill", "decode", "other")
QUICK = settings(max_examples=30)
times = st.floats(0, 1e12)
names = st.text(max_size=40)


def check(svg: str) -> ElementTree.Element:
    """Parses, has a title and a description, and draws nothing outside the frame."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = (float(part) for part in root.attrib["viewBox"].split())
    assert root[0].tag.endswith("title") and root[1].tag.endswith("desc")
    assert root.attrib["role"] == "img" and root.attrib["aria-label"]
    for x, y in _coordinates(root):
        assert -1e-6 <= x <= width + 0.01, (x, width)
        assert -1e-6 <= y <= height + 0.01, (y, height)
    return root


def _coordinates(root: ElementTree.Element) -> Iterator[tuple[float, float]]:
    for node in root.iter():
        tag, at = node.tag.rpartition("}")[2], node.attrib
        if tag == "line":
            yield float(at["x1"]), float(at["y1"])
            yield float(at["x2"]), float(at["y2"])
        elif tag == "rect":
            x, y = float(at["x"]), float(at["y"])
            yield x, y
            yield x + float(at["width"]), y + float(at["height"])
        elif tag == "circle":
            yield float(at["cx"]), float(at["cy"])
        elif tag in ("polygon", "path"):
            numbers = [float(n) for n in re.findall(r"-?[\d.]+(?:e[-+]?\d+)?", _points(at))]
            yield from zip(numbers[::2], numbers[1::2], strict=True)
        elif tag == "text":
            # As wide as the chart itself assumes: what is fitted has to end inside.
            wide = text_width(node.text or "", float(at["font-size"]))
            start = {"end": 1.0, "middle": 0.5}.get(at.get("text-anchor", ""), 0.0)
            x = float(at["x"]) - start * wide
            yield x, float(at["y"])
            yield x + wide, float(at["y"])


def _points(at: dict[str, str]) -> str:
    return at.get("points", at.get("d", ""))


def all_charts(width: float, name: str, values: list[float]) -> list[str]:
    spread: list[Interval] = [
        {"value": v, "low": v * 0.8, "high": min(v * 1.3, sys.float_info.max)} for v in values
    ]
    qualities = [interval(0.9 - 0.01 * i, 0.02) for i in range(len(values))]
    both = list(zip(spread, qualities, strict=True))
    return [
        ecdf_chart([(name, values)], width, "t"),
        latency_chart([(name, {"p50": one, "p95": one}) for one in spread], width, "t"),
        stage_chart([(name, dict.fromkeys(STAGES, v / 5)) for v in values], STAGES, width, "t"),
        pareto_chart(
            [Point(name, name, t, q, i) for i, (t, q) in enumerate(both)], width, "t", "m"
        ),
        share_chart([(name, min(v, 1.5), "1 of 2 ms") for v in values], width, "t", "%"),
        ratio_chart([(name, one, "ok") for one in spread if one["low"] > 0], 0.1, width, "t"),
    ]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "values",
    [[1.0], [7.0, 7.0], [1e-9, 1e12], [0.002, 0.0021], [99999.0] * 3, [1e300], [5.0] * 40],
)
@pytest.mark.parametrize("name", ["ours int4", "", LONG])
def test_charts_stay_inside(width: float, values: list[float], name: str) -> None:
    for svg in all_charts(width, name, values):
        check(svg)


@pytest.mark.parametrize("width", WIDTHS)
def test_without_data_there_is_no_chart(width: float) -> None:
    assert all_charts(width, "n", []) == [""] * 6
    nothing: Any = {"value": float("nan"), "low": None, "high": "x"}
    assert latency_chart([("n", {"p50": nothing, "p95": nothing})], width, "t") == ""
    assert ecdf_chart([("n", [float("nan")])], width, "t") == ""
    assert stage_chart([("n", {"decode": float("inf")})], STAGES, width, "t") == ""
    assert pareto_chart([Point("n", "", nothing, nothing)], width, "t", "m") == ""


@QUICK
@given(st.lists(st.tuples(names, st.lists(times, min_size=1, max_size=9)), min_size=1, max_size=8))
def test_distribution_of_anything(series: list[tuple[str, list[float]]]) -> None:
    for width in WIDTHS:
        check(ecdf_chart(series, width, "t"))


@QUICK
@given(st.lists(st.tuples(names, times, st.floats(0, 1), st.floats(0, 0.3)), max_size=14))
def test_pareto_of_anything(found: list[tuple[str, float, float, float]]) -> None:
    points = [Point(n, n, interval(t, t / 5), interval(q, r), 1) for n, t, q, r in found]
    for width in WIDTHS:
        if svg := pareto_chart(points, width, "t", "recall@1"):
            check(svg)


@QUICK
@given(st.lists(st.tuples(names, st.floats(1e-3, 1e3), st.floats(1, 10)), min_size=1, max_size=9))
def test_ratios_of_anything(found: list[tuple[str, float, float]]) -> None:
    rows = [(n, Interval(value=v, low=v / r, high=v * r), "ok") for n, v, r in found]
    for width in WIDTHS:
        check(ratio_chart(rows, 0.1, width, "t"))


@QUICK
@given(names, st.lists(st.dictionaries(st.sampled_from(STAGES), times), min_size=1, max_size=6))
def test_stages_of_anything(name: str, rows: list[dict[str, float]]) -> None:
    for width in WIDTHS:
        if svg := stage_chart([(name, row) for row in rows], STAGES, width, "t"):
            check(svg)


def test_stages_are_as_long_as_they_took() -> None:
    rows = [("a", {"vision": 30.0, "decode": 10.0})]
    root = check(stage_chart(rows, STAGES, 880.0, "t"))
    bars = {
        node.attrib["class"]: float(node.attrib["width"])
        for node in root.iter("{http://www.w3.org/2000/svg}rect")
        if float(node.attrib["height"]) == 14
    }
    assert bars["bar stage-vision"] == pytest.approx(3 * bars["bar stage-decode"], rel=1e-3)


def test_a_long_name_is_cut_and_whole_in_its_tooltip() -> None:
    root = check(latency_chart([(LONG, {"p50": interval(1, 0), "p95": interval(2, 0)})], 350, "t"))
    cut = [node for node in root.iter() if node.tag.endswith("text") and "…" in (node.text or "")]
    assert len(cut) == 1 and cut[0][0].text == LONG


@given(st.text(max_size=60), st.floats(1, 500))
def test_fitted_text_fits(text: str, room: float) -> None:
    shown = fitted(text, room)
    assert shown == text or (shown.endswith("…") and len(shown) <= len(text))
    assert text_width(shown) <= max(room, 2 * 12 * ADVANCE) + 1e-6


def test_frontier_keeps_what_nothing_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.9), (3.0, 0.8), (2.0, 0.7), (4.0, 0.95), (1.0, 0.4)]
    assert frontier(points) == [(1.0, 0.5), (2.0, 0.9), (4.0, 0.95)]


@given(st.floats(-1e12, 1e12), st.floats(0, 1e12))
def test_ticks_lie_on_the_axis(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 1 <= len(ticks) <= 12
    slack = 1e-6 * max(abs(low), span, 1e-300)
    assert all(low - slack <= tick <= low + span + slack for tick in ticks)


@given(st.floats(1e-12, 1e12), st.floats(1.1, 1e6))
def test_log_ticks_lie_on_the_axis(low: float, factor: float) -> None:
    assert all(low <= tick <= low * factor for tick in log_ticks(low, low * factor))


def test_scales() -> None:
    assert Scale(0, 10, 100, 200)(5) == 150
    assert Scale(0, 10, 100, 200)(-3) == 100 and Scale(0, 10, 100, 200)(30) == 200
    assert Scale(1, 100, 0, 2, log=True)(10) == pytest.approx(1)
    assert Scale(3, 3, 0, 10)(3) == 5
    assert not time_scale([10, 100], 0, 1).log and time_scale([1, 100], 0, 1).log
    assert time_scale([], 0, 1).low == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1\u202f234"), (12.345, "12.3"), (0.01234, "0.0123"), (1e9, "1.00e+09")]
    + [(None, "–"), (float("nan"), "–"), ("7", "–"), (True, "–")],
)  # fmt: skip
def test_numbers_as_people_write_them(value: Any, text: str) -> None:
    assert number(value) == text


def test_other_words() -> None:
    assert percent(0.1234) == "12.3 %" and percent(None) == "–"
    assert tick_label(0.1) == "0.1" and tick_label(20000) == "20\u202f000"
    assert with_interval(interval(0.5, 0.25), "percent") == "50.0 % [25.0, 75.0]"
    assert with_interval({"value": 1}) == "–" and with_interval(None) == "–"
