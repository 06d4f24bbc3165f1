"""What stands on the page, in order: a section is left out when there is nothing for it.

material -> cards, sections of charts (one drawing for wide screens, one for phones) and tables
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mmr5_bench.report import tables
from mmr5_bench.report.charts import Point, ecdf_chart, pareto_chart
from mmr5_bench.report.material import Material, View
from mmr5_bench.report.row_charts import latency_chart, ratio_chart, share_chart, stage_chart
from mmr5_bench.report.rules import LatencyRule, parse_rule
from mmr5_bench.report.scales import is_number, milliseconds, number
from mmr5_bench.report.svg import SERIES
from mmr5_bench.report.tables import Table

WIDE, PHONE = 880.0, 350.0
STAGES = (
    "load_pages",
    "image_decode",
    "preprocess",
    "vision",
    "kv_load",
    "prefill",
    "kv_save",
    "decode",
    "parse",
    "other",
)
# Of what is less than this everywhere nobody sees a bar; it is added to ``other``.
_VISIBLE = 0.01
_MOST_KERNELS = 24
_METRICS = ("recall@1", "macro_recall@1", "ndcg@5")


@dataclass(frozen=True)
class Card:
    """One headline figure."""

    label: str
    value: str
    unit: str
    detail: str


@dataclass(frozen=True)
class Chart:
    """One chart twice, drawn for wide screens and for phones; ``caption`` may be empty."""

    wide: str
    phone: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """What is told under one heading: charts, and tables below them."""

    id: str
    title: str
    lead: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()


def make_sections(material: Material) -> list[Section]:
    """Those that have something to show."""
    makers = (
        *(_regression, _distribution, _latency, _stages, _pareto, _peers),
        *(_roofline, _quality, _kernels, _skipped, _provenance),
    )
    return [section for make in makers if (section := make(material)) is not None]


def make_cards(material: Material) -> list[Card]:
    """Of the first entry that has quality, or the first: time, order, and how it compares."""
    views = material.views
    if not views:
        return []
    ours = [view for view in views if view.entry["subject"].startswith("ours")] or list(views)
    head = next((view for view in ours if view.entry.get("quality")), ours[0])
    cards = []
    for statistic in ("p50", "p95"):
        interval = head.entry["latency_ms"].get(statistic)
        if interval:
            spread = f"{number(interval['low'])} to {number(interval['high'])}"
            words = f"{head.label}; 95 % interval {spread}"
            cards.append(Card(f"{statistic} per request", number(interval["value"]), "ms", words))
    recall = (head.entry.get("quality") or {}).get("recall@1")
    if isinstance(recall, dict):
        spread = f"{100 * recall['low']:.1f} to {100 * recall['high']:.1f}"
        cards.append(Card("Recall@1", f"{100 * recall['value']:.1f}", "%", f"interval {spread}"))
    mates = next(group for group in tables.groups(views) if head in group)
    base = tables.baseline_of(mates)
    if base is not head:
        old, new = (view.entry["latency_ms"].get("p50") for view in (base, head))
        if old and new and new["value"] > 0:
            factor = number(old["value"] / new["value"])
            detail = f"as {base.label}, by p50 on the same lists"
            cards.append(Card("Times as fast", factor, "×", detail))
    if (share := _memory_share(head)) is not None:
        detail = "bytes read per second while decoding, of the machine's copy rate"
        cards.append(Card("Of the memory rate", f"{100 * share:.0f}", "%", detail))
    return cards[:5]


def _regression(material: Material) -> Section | None:
    title, comparison = "Against the baseline", material.comparison
    if comparison is None:
        note = material.comparison_note
        return Section("regression", title, note) if note else None
    short = {(view.entry["name"], view.entry["subject"]): view.label for view in material.views}
    charts: list[Chart] = []
    for text in comparison["rules"]:
        rule = parse_rule(text)
        rows = [row for row in comparison["rows"] if row["rule"] == text]
        if not isinstance(rule, LatencyRule) or not rows:
            continue
        drawn = [
            (short.get((row["name"], row["subject"]), row["name"]), row["ratio"], row["verdict"])
            for row in (*(p for p in comparison["pooled"] if p["rule"] == text), *rows)
        ]
        draw = partial(ratio_chart, drawn, rule.allowed, title=f"{rule.statistic} after / before")
        charts += _charts(draw, f"{rule.statistic}, after over before")
    baseline = material.baseline.name if material.baseline else "the first file"
    regressed = comparison["verdicts"].get("regressed", 0)
    lead = f"Baseline: {baseline}. " + (
        f"{regressed} of {len(comparison['rows']) + len(comparison['pooled'])} ratios certainly "
        "exceed what is allowed."
        if regressed
        else "Nothing is certainly slower than allowed."
    )
    shown = [tables.regression_table(comparison, short), tables.change_table(comparison)]
    kept = tuple(table for table in shown if table and table.rows)
    return Section("regression", title, lead, tuple(charts), kept)


def _distribution(material: Material) -> Section | None:
    views = _widest_group(material.views)
    if not views:
        return None
    same = len({view.group for view in views}) == 1 and len(views) > 1
    told_apart = len({view.entry["subject"] for view in views}) == len(views)
    lead = "Share of requests answered within a time."
    if same and told_apart and (setting := _shared([view.setting for view in views])):
        lead += f" All curves are of the same lists ({setting})."
    elif same:
        lead += " All curves are of the same lists."
    if len(views) > SERIES:
        lead += f" Of {len(views)} entries the baseline and the {SERIES - 1} fastest."
        views = _few(views)
    series = [
        (view.entry["subject"] if same and told_apart else view.label, view.entry["samples_ms"])
        for view in views
    ]
    title = "How long requests take"
    return Section("distribution", title, lead, _charts(lambda w: ecdf_chart(series, w, title)))


def _latency(material: Material) -> Section | None:
    if not material.views:
        return None
    rows = [(view.label, view.entry["latency_ms"]) for view in material.views]
    title = "p50 and p95 of every entry"
    lead = f"All entries: {material.common}." if material.common else ""
    found = [tables.latency_table(material.views), tables.work_table(material.views)]
    kept = tuple(table for table in found if table)
    charts = _charts(lambda w: latency_chart(rows, w, title))
    return Section("latency", title, lead, charts, kept)


def _stages(material: Material) -> Section | None:
    rows = [(v.label, _merged(v.entry.get("stages_ms") or {})) for v in material.views]
    rows = [(label, stages) for label, stages in rows if stages]
    tiny = {
        stage
        for stage in STAGES[:-1]
        if all(s.get(stage, 0.0) < _VISIBLE * math.fsum(s.values()) for _, s in rows)
    }
    rows = [(label, _folded(stages, tiny)) for label, stages in rows]
    title = "Where the time goes"
    charts = _charts(lambda w: stage_chart(rows, STAGES, w, title))
    lead = "Mean per request; the stages add up to its wall time."
    return Section("stages", title, lead, charts) if charts else None


def _pareto(material: Material) -> Section | None:
    metric = next((m for m in _METRICS if any(m in _quality_of(v) for v in material.views)), None)
    if metric is None:
        return None
    subjects = list(dict.fromkeys(view.entry["subject"] for view in material.views))
    sizes: dict[str, list[Point]] = {}
    for view in material.views:
        time, quality = view.entry["latency_ms"].get("p95"), _quality_of(view).get(metric)
        if time and quality:
            subject = view.entry["subject"]
            # Lists of other sizes are another task: one frontier over both would mean nothing.
            pages = view.entry["axes"].get("pages")
            size = f"{pages} pages" if pages is not None else ""
            name = ", ".join(part for part in view.setting.split(", ") if part != size)
            point = Point(subject, name, time, quality, subjects.index(subject))
            sizes.setdefault(size, []).append(point)
    charts: list[Chart] = []
    for size, points in sizes.items():
        title = f"{metric} against p95{', ' if size else ''}{size}"
        draw = partial(pareto_chart, points, title=title, metric=metric)
        charts += _charts(draw, size if len(sizes) > 1 else "")
    lead = (
        "Up and to the left is better; bars are 95 % intervals. The line joins the entries that "
        "no other beats in both."
    )
    return Section("pareto", "Quality against time", lead, tuple(charts)) if charts else None


def _peers(material: Material) -> Section | None:
    table = tables.peers_table(material)
    lead = "Measured in the same run on the same lists, the same pixels and the same limits."
    return Section("peers", "Others on the same work", lead, tables=(table,)) if table else None


def _roofline(material: Material) -> Section | None:
    rows = []
    for view in material.views:
        if (share := _memory_share(view)) is not None:
            rates = view.entry.get("rates", {})
            floor, step = rates.get("floor_ms_per_step"), rates.get("step_ms")
            both = is_number(floor) and is_number(step)
            words = f"{number(floor)} of {milliseconds(step)}" if both else ""
            rows.append((view.label, share, words))
    title = "Decoding against the machine's memory rate"
    unit = "% of the rate at which this machine copies memory"
    charts = _charts(lambda w: share_chart(rows, w, title, unit))
    lead = "A step cannot be faster than reading the weights and the KV once. Full is the floor."
    return Section("roofline", title, lead, charts) if charts else None


def _quality(material: Material) -> Section | None:
    table = tables.quality_table(material)
    lead = "What the orders are worth, and how the answers were read."
    return Section("quality", "Quality", lead, tables=(table,)) if table else None


def _kernels(material: Material) -> Section | None:
    rows = material.rows("kernels")
    table = tables.kernels_table(rows)
    if table is None:
        return None
    drawn = [
        (
            " ".join([*(str(row.get(k, "")) for k in ("op", "format")), _sides(row.get("shape"))]),
            float(row["share"]),
            "",
        )
        for row in rows
        if is_number(row.get("share"))
    ][:_MOST_KERNELS]
    title = "Kernels against their floor"
    charts = _charts(lambda w: share_chart(drawn, w, title, "% of the floor's speed"))
    lead = " ".join(material.kernel_notes) or (
        "Single operations on random operands; this is not how fast a model answers."
    )
    return Section("kernels", title, lead, charts, (table,))


def _skipped(material: Material) -> Section | None:
    table = tables.skipped_table(material.rows("skipped"))
    lead = "Asked for, and not measured here."
    return Section("skipped", "Not measured", lead, tables=(table,)) if table else None


def _provenance(material: Material) -> Section:
    table = tables.provenance_table(material)
    lead = "Every figure above is from these files."
    return Section("provenance", "Provenance", lead, tables=(table,))


def _charts(draw: Callable[[float], str], caption: str = "") -> tuple[Chart, ...]:
    """None when there is nothing to draw."""
    wide = draw(WIDE)
    return (Chart(wide, draw(PHONE), caption),) if wide else ()


def _quality_of(view: View) -> dict[str, Any]:
    return view.entry.get("quality") or {}


def _memory_share(view: View) -> float | None:
    """Of the rate at which the machine reads memory, while decoding."""
    rates: dict[str, Any] = view.entry.get("rates") or {}
    share = rates.get("memory_share", rates.get("copy_share"))
    return float(share) if is_number(share) else None


def _few(views: Sequence[View]) -> list[View]:
    """As many as can be told apart: the baseline and those of the lowest median, in their order."""
    base = tables.baseline_of(views)
    ordered = sorted(views, key=lambda v: (v is not base, float(np.median(v.entry["samples_ms"]))))
    kept = {id(view) for view in ordered[:SERIES]}
    return [view for view in views if id(view) in kept]


def _shared(settings: Sequence[str]) -> str:
    """The parts that all have."""
    first, *others = ([*setting.split(", ")] for setting in settings)
    return ", ".join(part for part in first if all(part in other for other in others))


def _widest_group(views: Sequence[View]) -> list[View]:
    """Most subjects on equal work, then most requests; without two of one work, of one size."""
    if not views:
        return []
    best = max(
        tables.groups(views),
        key=lambda group: (len(group), sum(len(view.entry["samples_ms"]) for view in group)),
    )
    if len(best) > 1:
        return best
    pages = views[0].entry["axes"].get("pages")
    return [view for view in views if view.entry["axes"].get("pages") == pages]


def _merged(stages: dict[str, Any]) -> dict[str, float]:
    """Known stages; one of a later version counts as other."""
    found: dict[str, float] = {}
    for stage, value in stages.items():
        name = stage if stage in STAGES else "other"
        if is_number(value):
            found[name] = found.get(name, 0.0) + float(value)
    return found


def _folded(stages: dict[str, float], tiny: set[str]) -> dict[str, float]:
    kept = {stage: value for stage, value in stages.items() if stage not in tiny}
    rest = math.fsum(value for stage, value in stages.items() if stage in tiny)
    return {**kept, "other": kept.get("other", 0.0) + rest} if rest else kept


def _sides(shape: Any) -> str:
    return "×".join(str(side) for side in shape) if isinstance(shape, list) else ""
