"""What was measured of the goals: one figure per goal and configuration, and the table of them.

Everything that is shown says what it is of: random weights, and of a dry run, that it is none.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Required, TypedDict

from mmr5_bench.evidence.statistics import Interval
from mmr5_bench.targets.goals import GOALS, Goal, goal

RANDOM = "Random weights of the 7B's shape; not a figure of MM-R5."
DRY = "DRY RUN: a tiny model on a CPU, Triton in its interpreter. No figure here means anything."


class Figure(TypedDict, total=False):
    """``value`` in the goal's unit by one configuration; lists of samples are in it too.

    ``floor`` is in the same unit, from ceilings of this run; ``share`` is how near it is: floor
    over value. ``met`` is None in a dry run. ``details`` are further numbers about it. ``library``
    marks a kernel of another library: shown beside ours, and never what meets a target.
    """

    goal: Required[str]
    configuration: Required[str]
    unit: Required[str]
    value: Required[float]
    target: Required[float]
    met: Required[bool | None]
    dry_run: Required[bool]
    samples: list[float]
    interval: Interval
    floor: float
    share: float
    details: dict[str, Any]
    note: str
    library: bool


class Missing(TypedDict):
    """What was not measured, and why."""

    goal: str
    configuration: str
    reason: str


def figure(
    key: str,
    configuration: str,
    samples: Sequence[float],
    *,
    dry_run: bool,
    floor: float | None = None,
    details: dict[str, Any] | None = None,
    note: str = "",
) -> Figure:
    """The median of ``samples``, all in the goal's unit; ValueError for none."""
    if not samples:
        raise ValueError(f"{key} under {configuration} has no samples")
    wanted, value = goal(key), statistics.median(samples)
    found: Figure = {
        "goal": key,
        "configuration": configuration,
        "unit": wanted.unit,
        "value": value,
        "target": wanted.target,
        "met": None if dry_run else wanted.met_by(value),
        "dry_run": dry_run,
        "samples": list(samples),
        "details": details or {},
        "note": note,
    }
    if floor is not None:
        found["floor"] = floor
        found["share"] = floor / value if value > 0 else 0.0
    return found


def best_of(figures: Sequence[Figure], key: str) -> Figure | None:
    """The best figure of a goal that is ours, of whichever configuration; None for none."""
    wanted = goal(key)
    best: Figure | None = None
    for one in figures:
        if one["goal"] != key or one.get("library"):
            continue
        if best is None or wanted.better(one["value"], best["value"]):
            best = one
    return best


def table(figures: Sequence[Figure], missing: Sequence[Missing], *, dry_run: bool) -> str:
    """Every goal with its best configuration, then each of the others, for people."""
    head = ("goal", "floor", "target", "measured", "of floor", "", "by")
    rows: list[tuple[str, ...]] = [head]
    for wanted in GOALS:
        own = [one for one in figures if one["goal"] == wanted.key]
        best = best_of(own, wanted.key)
        if best is None:
            reasons = [one["reason"] for one in missing if one["goal"] == wanted.key]
            rows.append(_line(wanted, None, reasons[0] if reasons else "not asked for", dry_run))
            continue
        rows.append(_line(wanted, best, best["configuration"], dry_run))
        rows += [
            _line(wanted, one, one["configuration"], dry_run, True)
            for one in own
            if one is not best
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = [DRY if dry_run else RANDOM]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    lines += [
        f"not measured: {one['goal']} by {one['configuration']}: {one['reason']}" for one in missing
    ]
    return "\n".join([*lines, DRY if dry_run else RANDOM])


def markdown(figures: Sequence[Figure], *, dry_run: bool) -> str:
    """The table of the best figures, for a document."""
    lines = [
        f"{DRY if dry_run else RANDOM}",
        "",
        "| | floor | target | measured | of floor | by |",
        "|---|---|---|---|---|---|",
    ]
    for wanted in GOALS:
        best = best_of(figures, wanted.key)
        name = "" if best is None else best["configuration"]
        cells = _line(wanted, best, name, dry_run)
        floor, target, measured, share, verdict = cells[1:6]
        shown = "not measured" if best is None else f"{measured} {verdict}".strip()
        lines.append(f"| {wanted.what} | {floor} | {target} | {shown} | {share} | {name} |")
    return "\n".join(lines)


def _line(
    wanted: Goal, found: Figure | None, by: str, dry_run: bool, indented: bool = False
) -> tuple[str, ...]:
    name = f"  {'':<2}" if indented else wanted.what
    target = "" if indented else f"{wanted.sign} {number(wanted.target, wanted.unit)}"
    if found is None:
        floor = "" if wanted.stated_floor is None else number(wanted.stated_floor, wanted.unit)
        return name, floor, target, "-", "", "", by
    floor = number(found["floor"], wanted.unit) if "floor" in found else ""
    share = f"{found['share']:.0%}" if "share" in found else ""
    verdict = {True: "met", False: "MISSED", None: "dry run"}[None if dry_run else found["met"]]
    return name, floor, target, number(found["value"], wanted.unit), share, verdict, by


def number(value: float, unit: str) -> str:
    """A figure with its unit, three digits of it."""
    if unit == "of copy":
        return f"{value:.0%} of copy"
    digits = max(0, 2 - len(str(int(abs(value)))) + 1)
    return f"{value:.{digits}f} {unit}"
