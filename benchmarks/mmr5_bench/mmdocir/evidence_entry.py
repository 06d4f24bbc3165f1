"""A run as an entry of an evidence document, for reports and comparisons of latency and quality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmr5_bench.evidence.document import Entry, Evidence, new_evidence
from mmr5_bench.evidence.observe import work_id
from mmr5_bench.evidence.statistics import latency_summary
from mmr5_bench.mmdocir.metrics import RECALLS
from mmr5_bench.mmdocir.records import Record

# Where and how fast it is computed, and what is remembered; not what is asked.
_NOT_WORK = ("device", "dtype", "cache", "limit")


def evidence_of(document: Mapping[str, Any]) -> Evidence:
    """The evidence document with the one entry of a results document that has its summary.

    ValueError when no list of several pages was answered, so that there is no time to report.
    """
    evidence = new_evidence("MMDocIR page reranking", document["note"], document["machine"])
    evidence["provenance"] = document["provenance"]
    evidence["created"] = document["created"]
    evidence["entries"] = [_entry(document)]
    return evidence


def _entry(document: Mapping[str, Any]) -> Entry:
    identity, options, summary = (document[key] for key in ("identity", "options", "summary"))
    records: list[Record] = [
        record
        for record in document["records"]
        if record["ms"] is not None and len(record["candidates"]) > 1
    ]
    if not records:
        raise ValueError("no list was answered, so there is no latency to report")
    quant = identity["engine"]["quant"]
    axes = {
        "workload": "mmdocir",
        "first_stage": identity["candidates"]["first_stage"],
        "pages": identity["candidates"]["k"],
        "quant": quant,
        "cache": "cold" if options["cache"] == "off" else "kept",
        "stop": options["stop"],
        "think": options["think"],
    }
    described = ",".join(f"{name}={value}" for name, value in axes.items())
    samples = [record["ms"] for record in records if record["ms"] is not None]
    asked = {name: value for name, value in options.items() if name not in _NOT_WORK}
    deciding = [identity[key] for key in ("data", "candidates", "prompt", "pixels")]
    entry: Entry = {
        "name": f"mmdocir[{described}]",
        "subject": f"ours {quant}",
        "axes": axes,
        "work": work_id(deciding, asked, [record["question"] for record in records]),
        "samples_ms": samples,
        "warmup": 1,
        "latency_ms": latency_summary(samples),
        "stages_ms": _means([record["stages_ms"] for record in records]),
        "tokens": _means([record["tokens"] or {} for record in records]),
        "quality": _quality(summary),
        "note": document["note"],
    }
    first = [record["first_token_ms"] for record in records]
    times = [ms for ms in first if ms is not None]
    if times:
        entry["ttft_ms"] = latency_summary(times)
    return entry


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names}


def _quality(summary: Mapping[str, Any]) -> dict[str, Any]:
    """No macro of a part of the benchmark: it is not to be quoted."""
    found: dict[str, Any] = {"cases": summary["questions"], **summary["micro"]}
    if summary["macro"] is not None:
        found |= {f"macro_{name}": summary["macro"][name] for name in RECALLS}
    found |= {name: summary["rates"][name] for name in ("ok", "repaired", "fallback")}
    against = summary.get("against")
    if against is not None:
        found["top1_agreement"] = against["first_page"]
        found["order_agreement"] = against["order"]
        if against["kendall_tau"] is not None:
            found["kendall_tau"] = against["kendall_tau"]
    return found
