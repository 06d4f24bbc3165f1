"""The tables of a report as plain cells, for HTML and Markdown alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmr5_bench.evidence.statistics import ratio_interval
from mmr5_bench.report.material import Material, View
from mmr5_bench.report.scales import MISSING, is_number, number, percent, with_interval


@dataclass(frozen=True)
class Table:
    """Cells as text; the first ``texts`` columns are words, the others numbers.

    ``tones`` has a word per row for its colour (a verdict), empty for none at all; a ``folded``
    table is opened by the reader.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    tones: tuple[str, ...] = ()
    note: str = ""
    folded: bool = False


def latency_table(views: Sequence[View]) -> Table:
    """Times per entry with the intervals of p50 and p95."""
    head = ("Entry", "p50, ms", "p95, ms", "p99, ms", "Mean, ms", "First token", "Per token")
    rows = []
    for view in views:
        summary = view.entry["latency_ms"]
        rows.append(
            (
                view.label,
                with_interval(summary.get("p50")),
                with_interval(summary.get("p95")),
                _value(summary, "p99"),
                _value(summary, "mean"),
                _value(view.entry.get("ttft_ms"), "p50"),
                _value(view.entry.get("per_token_ms"), "p50"),
                str(len(view.entry["samples_ms"])),
            )
        )
    note = "95 % bootstrap intervals in brackets; first token and per token: medians, ms."
    return Table("Wall time per request", (*head, "Requests"), tuple(rows), note=note)


def work_table(views: Sequence[View]) -> Table | None:
    """Tokens, memory and the state of the GPU; None when no entry says."""
    head = ("Entry", "Prompt", "Image", "Answer", "Steps", "RAM peak", "GPU peak", "GPU")
    rows = []
    for view in views:
        tokens, memory = view.entry.get("tokens", {}), view.entry.get("memory", {})
        counts = [_value(tokens, key) for key in ("prompt", "image", "completion", "decode_steps")]
        peaks = [_mebibytes(memory.get(key)) for key in ("peak_rss_bytes", "peak_gpu_bytes")]
        rows.append((view.label, *counts, *peaks, _gpu_state(view.entry.get("gpu"))))
    note = "Tokens: means per request. Memory in MiB, of the whole process."
    return _useful(Table("Work and memory", head, tuple(rows), note=note, folded=True))


def peers_table(material: Material) -> Table | None:
    """Every subject against a baseline of the same work in the same run; None without a pair."""
    rows = []
    for views in groups(material.views):
        if len(views) < 2:
            continue
        base = baseline_of(views)
        for view in views:
            ratios = [
                "1" if view is base else with_interval(_against(base, view, statistic))
                for statistic in ("p50", "p95")
            ]
            rows.append((view.label, base.entry["subject"], *ratios))
    if not rows:
        return None
    note = "Time over that of the baseline on the same lists: below 1 is faster. Equal work only."
    head = ("Entry", "Baseline", "p50 ratio", "p95 ratio")
    return Table("Against a baseline on the same work", head, tuple(rows), texts=2, note=note)


def quality_table(material: Material) -> Table | None:
    """Metrics of every entry and judgement that has any; columns that none has are left out."""
    found: list[tuple[str, Mapping[str, Any]]] = [
        (view.label, view.entry["quality"]) for view in material.views if view.entry.get("quality")
    ]
    found += [
        (f"{row.get('subject')}, {row.get('dataset')}", row["quality"])
        for row in material.rows("qualities")
        if isinstance(row.get("quality"), dict)
    ]
    names = dict.fromkeys(name for _, quality in found for name in quality if name != "cases")
    if not names:
        return None
    shares = ("ok", "repaired", "fallback", "error", "top1_agreement", "order_agreement")
    rows = [
        (
            label,
            str(quality.get("cases", MISSING)),
            *(
                with_interval(quality.get(name), "percent" if name in shares else "fraction")
                for name in names
            ),
        )
        for label, quality in found
    ]
    note = (
        "recall@k is the mean over lists (micro), macro_recall@k over domains; ok, repaired and "
        "fallback say how the answers could be read. 95 % intervals in brackets."
    )
    return Table("Quality of the orders", ("Entry", "Lists", *names), tuple(rows), note=note)


def kernels_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Single operations against their floor and against the dense product."""
    if not rows:
        return None
    head = ("Operation", "Format", "M × N × K", "ms", "Floor, ms", "Of floor", "Dense, ms")
    cells = tuple(
        (
            " ".join(str(row[key]) for key in ("op", "kernel") if row.get(key)) or MISSING,
            str(row.get("format", MISSING)),
            _shape(row.get("shape")),
            with_interval(row.get("ms")),
            number(row.get("floor_ms")),
            percent(row.get("share"), 0),
            _plain(row.get("dense_ms")),
            with_interval(row.get("ratio")),
        )
        for row in rows
    )
    note = (
        "Floor: the time that the machine's measured rates would take; of floor: floor over "
        "measured, higher is better. Ratio: time over that of the dense product, below 1 is faster."
    )
    return Table("Kernels", (*head, "Ratio"), cells, texts=3, note=note)


def regression_table(
    comparison: Mapping[str, Any], names: Mapping[tuple[str, str], str] | None = None
) -> Table:
    """Pooled rows first, then the entries, worst verdict first; ``names`` are shorter ones."""
    order = {"regressed": 0, "suspect": 1, "improved": 2, "ok": 3}
    single = sorted(comparison["rows"], key=lambda r: (order[r["verdict"]], -r["ratio"]["value"]))
    every = [*comparison["pooled"], *single]
    known = names or {}
    rows = [
        (
            known.get((row["name"], row["subject"]), f"{row['subject']} {row['name']}".strip()),
            row["rule"],
            number(row["before_ms"]),
            number(row["after_ms"]),
            with_interval(row["ratio"]),
            row["verdict"] + (f" ({row['note']})" if row["note"] else ""),
        )
        for row in every
    ]
    head = ("Entry", "Rule", "Before, ms", "After, ms", "Paired ratio", "Verdict")
    note = (
        "Paired ratio: after over before, list by list (p50: the median; tail: that of the slowest "
        "quarter). "
        "regressed: certainly slower than the rule allows; suspect: measured slower, not certain. "
        "Intervals of entries are wide enough for all rows to hold together."
    )
    tones = tuple(row["verdict"] for row in every)
    caption = f"All {len(rows)} ratios"
    return Table(caption, head, tuple(rows), texts=2, tones=tones, note=note, folded=True)


def change_table(comparison: Mapping[str, Any]) -> Table | None:
    """Quality rules of a comparison; None when none was asked for."""
    rows = [
        (
            row["name"],
            row["subject"],
            row["rule"],
            f"{row['before']:.3f}",
            f"{row['after']:.3f}",
            with_interval(row["change"], "change"),
            row["verdict"],
        )
        for row in comparison["quality"]
    ]
    head = ("Entry", "Subject", "Rule", "Before", "After", "Change", "Verdict")
    tones = tuple(row["verdict"] for row in comparison["quality"])
    return Table("Quality", head, tuple(rows), texts=3, tones=tones) if rows else None


def skipped_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """What was not measured, and why."""
    cells = tuple((str(row.get("subject")), str(row.get("reason"))) for row in rows)
    return Table("Not measured", ("Subject", "Reason"), cells, texts=2) if cells else None


def provenance_table(material: Material) -> Table:
    """One column per file: what ran where, when and by which code."""
    sources = list(material.sources)
    if material.baseline and material.baseline not in sources:
        sources.insert(0, material.baseline)
    facts: dict[str, list[str]] = {}
    for index, source in enumerate(sources):
        evidence = source.evidence
        told: dict[str, Any] = {"title": evidence["title"], "created": evidence["created"]}
        told |= {f"machine {key}": value for key, value in evidence["machine"].items()}
        told |= evidence["provenance"]
        told["sha256 of the file"] = source.sha256
        for key, value in told.items():
            if isinstance(value, str | int | float | bool) and value != "":
                column = facts.setdefault(str(key), [MISSING] * len(sources))
                column[index] = str(value)
    rows = tuple((key, *values) for key, values in facts.items())
    head = ("", *(source.name for source in sources))
    return Table("Where the figures come from", head, rows, texts=len(head))


def groups(views: Sequence[View]) -> list[list[View]]:
    """Views of equal work on one machine, in the order they appear."""
    found: dict[tuple[str, str], list[View]] = {}
    for view in views:
        found.setdefault(view.group, []).append(view)
    return list(found.values())


def baseline_of(views: Sequence[View]) -> View:
    """The first that is not ours, else the first."""
    return next((v for v in views if not v.entry["subject"].startswith("ours")), views[0])


def _against(base: View, view: View, statistic: Any) -> Any:
    old, new = base.entry["samples_ms"], view.entry["samples_ms"]
    try:
        return ratio_interval(old, new, statistic, paired=len(old) == len(new), resamples=2000)
    except ValueError:  # a time of zero: there is no ratio to show
        return None


def _useful(table: Table) -> Table | None:
    """Without the columns in which nothing stands; None when only names are left."""
    kept = [
        index
        for index in range(len(table.head))
        if index < table.texts or any(row[index] != MISSING for row in table.rows)
    ]
    if len(kept) <= table.texts:
        return None
    head = tuple(table.head[index] for index in kept)
    rows = tuple(tuple(row[index] for index in kept) for row in table.rows)
    return replace(table, head=head, rows=rows)


def _value(summary: Any, key: str) -> str:
    return _plain(summary.get(key)) if isinstance(summary, dict) else MISSING


def _plain(value: Any) -> str:
    return number(value.get("value") if isinstance(value, dict) else value)


def _mebibytes(count: Any) -> str:
    return number(count / 2**20) if is_number(count) else MISSING


def _gpu_state(gpu: Any) -> str:
    if not isinstance(gpu, dict):
        return MISSING
    clock = gpu.get("clock_mhz")
    clock = clock.get("mean") if isinstance(clock, dict) else clock
    units = ((clock, "MHz"), (gpu.get("temperature_c"), "°C"), (gpu.get("power_w"), "W"))
    means = [(v.get("mean") if isinstance(v, dict) else v, unit) for v, unit in units]
    told = [f"{number(value)} {unit}" for value, unit in means if is_number(value)]
    return ", ".join([*told, *(["throttled"] if gpu.get("throttled") else [])]) or MISSING


def _shape(shape: Any) -> str:
    return "\u00a0×\u00a0".join(str(side) for side in shape) if isinstance(shape, list) else MISSING
