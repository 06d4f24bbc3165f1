"""Short Markdown tables of an evidence document, for a README; the report has the long ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Sequence[str]]


def evidence_table(document: Mapping[str, Any]) -> str:
    """What the document measured: others beside ours, our engines, or only quality."""
    entries, qualities = document["entries"], document.get("qualities", [])
    if any("ratios" in entry for entry in entries):
        table = _peers(entries)
    elif entries:
        table = _latency(entries)
    elif qualities:
        table = _quality(qualities)
    else:
        raise ValueError("this evidence has no entries, so there is no table; measure again")
    return f"{table}\n\n{_origin(document)}"


def _latency(entries: Sequence[Mapping[str, Any]]) -> str:
    head = ("Pages", "Engine", "Cache", "Stop", "Reasoning", "p50, ms", "p95, ms", "First token")
    rows = []
    for entry in entries:
        axes, quality = entry["axes"], entry.get("quality", {})
        rows.append(
            (
                str(axes.get("pages", "")),
                _engine(entry),
                *(str(axes.get(axis, "")) for axis in ("cache", "stop", "think")),
                _time(entry["latency_ms"]["p50"]),
                _time(entry["latency_ms"]["p95"]),
                _median(entry, "ttft_ms", ".0f"),
                _median(entry, "per_token_ms", ".1f"),
                _share(quality.get("recall@1")),
                _share(quality.get("top1_agreement")),
            )
        )
    return markdown((*head, "Per token", "Recall@1", "First page = bf16"), rows, texts=5)


def _peers(entries: Sequence[Mapping[str, Any]]) -> str:
    head = ("Pages", "Runtime", "p50, ms", "p95, ms", "First token", "p50 ratio", "p95 ratio")
    rows = []
    for entry in entries:
        ratios, quality = entry.get("ratios", {}), entry.get("quality", {})
        rows.append(
            (
                str(entry["axes"].get("pages", "")),
                entry["subject"],
                _time(entry["latency_ms"]["p50"]),
                _time(entry["latency_ms"]["p95"]),
                _median(entry, "ttft_ms", ".0f"),
                _ratio(ratios.get("p50")),
                _ratio(ratios.get("p95")),
                _share(quality.get("identical")),
                _share(quality.get("recall@1")),
            )
        )
    return markdown((*head, "Same answers", "Recall@1"), rows, texts=2)


def _quality(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ("recall@1", "recall@3", "recall@5", "macro_recall@1", "ok", "top1_agreement")
    head = ("Engine", "Pages", "Lists", *names)
    cells = []
    for row in rows:
        quality = row["quality"]
        shown = (_fraction(quality.get(name)) for name in names)
        pages, cases = str(row["axes"].get("pages", "")), str(quality["cases"])
        cells.append((row["subject"], pages, cases, *shown))
    return markdown(head, cells, texts=1)


def _origin(document: Mapping[str, Any]) -> str:
    machine, origin = document["machine"], document["provenance"]
    rounds = sorted({len(entry["samples_ms"]) for entry in document["entries"]})
    lists = f"{' to '.join(map(str, rounds))} lists per row; " if rounds else ""
    threads = machine.get("threads")
    processor = f"{machine.get('host_cpu')}, {threads} thread{'' if threads == 1 else 's'}"
    where = machine.get("gpu") or processor
    brackets = "95 % intervals in brackets; first token and per token: medians, ms."
    return (
        f"{document['note'].rstrip('.')}. {lists}{brackets} {where}, torch {origin['torch']}, "
        f"commit {origin['commit']}."
    )


def markdown(head: Sequence[str], rows: Rows, texts: int) -> str:
    """A table whose first ``texts`` columns are words, and the others numbers."""
    rule = [":--"] * texts + ["--:"] * (len(head) - texts)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _engine(entry: Mapping[str, Any]) -> str:
    """What was asked, and through what if not through ``rerank``."""
    base, quant = entry["name"].partition("[")[0], str(entry["axes"].get("quant", ""))
    return quant if base == "rerank" else f"{quant}, {base}"


def _time(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.0f} [{interval['low']:.0f}, {interval['high']:.0f}]"


def _ratio(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "1"
    return f"{interval['value']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def _fraction(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return ""
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _share(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return ""
    value, low, high = (round(100 * interval[end]) for end in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"


def _median(entry: Mapping[str, Any], key: str, form: str) -> str:
    return format(entry[key]["p50"]["value"], form) if key in entry else ""
