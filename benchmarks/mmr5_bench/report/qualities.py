"""Metrics of two runs against what they may lose: intervals only, lists are not in the files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from mmr5_bench.evidence.document import Entry, Evidence
from mmr5_bench.evidence.statistics import Interval
from mmr5_bench.report.rules import LESS_IS_BETTER, QualityRule

Pair = tuple[str, str, dict[str, Any], dict[str, Any]]


def judge_qualities(
    before: Evidence,
    after: Evidence,
    pairs: Sequence[tuple[Entry, Entry]],
    rules: Sequence[QualityRule],
) -> list[dict[str, Any]]:
    """One row per rule and pair that has the metric.

    ``regressed`` when the whole interval of the change is worse than allowed, ``suspect`` when the
    change itself is. ValueError when a metric is in neither or missing afterwards: a rule that
    nothing was held against has not passed.
    """
    sources = [
        (old["name"], old["subject"], old.get("quality") or {}, new.get("quality") or {})
        for old, new in pairs
    ]
    sources += _rows_of_both(before, after)
    return [row for rule in rules for row in _judge(rule, sources)]


def _judge(rule: QualityRule, sources: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    found = False
    for name, subject, old, new in sources:
        if rule.metric not in old:
            continue
        if rule.metric not in new:
            raise ValueError(
                f"{rule.text}: {name} {subject} had {rule.metric} and has it no more; measure it "
                "again, or leave the rule out"
            )
        if old.get("cases") != new.get("cases"):
            raise ValueError(
                f"{rule.text}: {name} {subject} was judged on {old.get('cases')} lists before and "
                f"on {new.get('cases')} after; judge it on the same"
            )
        found = True
        change = change_interval(old[rule.metric], new[rule.metric])
        yield {
            "name": name,
            "subject": subject,
            "rule": rule.text,
            "metric": rule.metric,
            "before": old[rule.metric]["value"],
            "after": new[rule.metric]["value"],
            "change": change,
            "verdict": _verdict(change, rule),
        }
    if not found:
        raise ValueError(
            f"{rule.text}: no entry of both files has {rule.metric}; measure quality with both, or "
            "leave the rule out"
        )


def change_interval(before: Interval, after: Interval) -> Interval:
    """``after`` less ``before`` from the intervals of both (MOVER; Zou and Donner, 2008).

    The lists are the same in both, so the true interval is no wider: this one errs towards suspect.
    """
    value = after["value"] - before["value"]
    low = math.hypot(after["value"] - after["low"], before["high"] - before["value"])
    high = math.hypot(after["high"] - after["value"], before["value"] - before["low"])
    return {"value": value, "low": value - low, "high": value + high}


def _verdict(change: Interval, rule: QualityRule) -> str:
    worse, surely, better = change["value"], change["low"], change["high"]
    if rule.metric not in LESS_IS_BETTER:
        worse, surely, better = -change["value"], -change["high"], -change["low"]
    # 0.9 - 0.88 is a little more than 0.02 in binary, and meant to be allowed.
    if worse > rule.allowed + 1e-9:
        return "regressed" if surely > rule.allowed else "suspect"
    return "improved" if better < -rule.allowed else "ok"


def _rows_of_both(before: Evidence, after: Evidence) -> Iterator[Pair]:
    """Judgements of runs that were not about time, by data set, subject and axes."""

    def key(row: Any) -> tuple[str, str, str]:
        return row["dataset"], row["subject"], json.dumps(row["axes"], sort_keys=True)

    later = {key(row): row["quality"] for row in after.get("qualities", [])}
    for row in before.get("qualities", []):
        if key(row) in later:
            yield row["dataset"], row["subject"], row["quality"], later[key(row)]
