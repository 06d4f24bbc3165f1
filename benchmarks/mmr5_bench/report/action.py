"""Results for github-action-benchmark (``customSmallerIsBetter``): smaller is better in every row.

https://github.com/benchmark-action/github-action-benchmark reads a list of name, unit, value,
range and extra. Quality is turned round: ``recall@1 loss`` is 100 less the recall in percent.
"""

from __future__ import annotations

from typing import Any

from mmr5_bench.report.material import Material

_LOSSES = ("recall@1", "macro_recall@1", "ndcg@5", "mrr", "top1_agreement")
_SHARES = ("repaired", "fallback", "error")


def action_results(material: Material) -> list[dict[str, Any]]:
    """One row per entry for p50 and p95 in ms, and for every quality it has in percent."""
    rows: list[dict[str, Any]] = []
    for view in material.views:
        entry = view.entry
        # The full name: what is short enough in one report may mean something else in the next.
        name = f"{entry['subject']} {entry['name']}"
        extra = f"work {entry['work']}, {len(entry['samples_ms'])} requests"
        for statistic in ("p50", "p95"):
            interval = entry["latency_ms"].get(statistic)
            if interval:
                rows.append(_row(f"{name} {statistic}", "ms", interval, extra))
        quality = entry.get("quality") or {}
        extra = f"{quality.get('cases', '?')} lists"
        for metric in (m for m in (*_LOSSES, *_SHARES) if m in quality):
            percent = {end: 100 * value for end, value in quality[metric].items()}
            if metric in _SHARES:
                rows.append(_row(f"{name} {metric} share", "%", percent, extra))
                continue
            loss = {
                "value": 100 - percent["value"],
                "low": 100 - percent["high"],
                "high": 100 - percent["low"],
            }
            rows.append(_row(f"{name} {metric} loss", "% lost of 100", loss, extra))
    return rows


def _row(name: str, unit: str, interval: Any, extra: str) -> dict[str, Any]:
    reach = max(interval["high"] - interval["value"], interval["value"] - interval["low"])
    return {
        "name": name,
        "unit": unit,
        "value": round(interval["value"], 4),
        "range": f"± {reach:.3g}",
        "extra": f"{extra}, 95 % interval {interval['low']:.4g} to {interval['high']:.4g}",
    }
