"""A summary as lines of text for people: four decimals, as the papers print fractions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmr5_bench.mmdocir.metrics import METRICS, RECALLS

_WIDTH = 24


def table_of(document: Mapping[str, Any]) -> str:
    """Figures of a results document that has its ``summary``; differences where it has them."""
    return "\n".join(_lines(document, document["summary"]))


def _lines(document: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    identity = document["identity"]
    engine, lists = identity["engine"], identity["candidates"]
    yield (
        f"MMDocIR pages: {engine['name']} ({engine['quant']}, {engine['dtype']}) over "
        f"{lists['first_stage']} top-{lists['k']}, {summary['questions']} questions"
    )
    yield document["note"]
    if summary["failed_note"]:
        yield summary["failed_note"]
    if summary["ranked_places"] is not None:
        yield f"only the first {summary['ranked_places']} places were ranked; - looks beyond them"
    yield " " * _WIDTH + "".join(f"{name:>12}" for name in METRICS)
    yield from _rows("", summary)
    yield from _rows("first stage ", summary["first_stage"])
    yield from _rows("over first stage ", summary["over_first_stage"], signed=True)
    for row in summary["domains"]:
        if not row["questions"]:
            continue
        cells = "".join(_cell(row[name], ".4f") for name in METRICS)
        yield f"{row['domain'][: _WIDTH - 6]:<{_WIDTH - 5}}{row['questions']:>4} {cells}"
    if summary["subset"]:
        yield "macro: not quoted, these are not all questions of all ten domains"
    rates = summary["rates"]
    yield "  ".join(f"{name} {100 * rates[name]['value']:.2f} %" for name in rates)
    for kind, error in summary["errors"].items():
        question, message = error["first"]["question"], error["first"]["message"]
        yield f"{error['count']} x {kind}, first in question {question}: {message}"
    yield from _costs(summary)
    if "against" in summary:
        yield from _against(summary["against"])


def _rows(prefix: str, averages: Mapping[str, Any], *, signed: bool = False) -> Iterator[str]:
    for name in ("micro", "macro", "macro_without_news"):
        intervals = averages.get(name)
        if intervals is not None:
            label = f"{prefix}{name}".replace("_", " ")
            found = (intervals[metric] for metric in METRICS)
            yield f"{label:<{_WIDTH}}" + "".join(
                _cell(None if one is None else one["value"], "+.4f" if signed else ".4f")
                for one in found
            )


def _cell(value: float | None, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>12}"


def _costs(summary: Mapping[str, Any]) -> Iterator[str]:
    if summary["tokens"]:
        yield "tokens, mean / p95: " + ", ".join(
            f"{name} {found['mean']:.1f} / {found['p95']:.0f}"
            for name, found in summary["tokens"].items()
        )
    for length, found in summary["latency_ms"].items():
        pages = "all lists" if length == "all" else f"{length} pages"
        yield (
            f"{pages}: p50 {found['p50']['value']:.1f} ms, p95 {found['p95']['value']:.1f} ms "
            f"({found['questions']} questions)"
        )


def _against(against: Mapping[str, Any]) -> Iterator[str]:
    engine = against["reference"]["identity"]["engine"]
    yield (
        f"against {engine['name']} ({engine['quant']}, {engine['dtype']}); agreement over the "
        f"{against['compared']} questions that both answered:"
    )
    for name in ("first_page", "order", "kendall_tau", "same_text"):
        if against[name] is not None:
            yield f"  {name.replace('_', ' '):<14}{_interval(against[name])}"
    for name in ("micro", "macro", "macro_without_news"):
        intervals = against["differences"].get(name)
        for metric in RECALLS if intervals is not None else ():
            if intervals[metric] is not None:
                label = f"{name} {metric}".replace("_", " ")
                yield f"  {label:<30}{_interval(intervals[metric], '+.4f')}"


def _interval(found: Mapping[str, float], form: str = ".4f") -> str:
    return f"{found['value']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"
