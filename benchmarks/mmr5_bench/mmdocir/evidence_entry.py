"""A run as an entry of an evidence document, for reports and comparisons of latency and quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmr5_bench.evidence.document import Entry, Evidence, new_evidence
from mmr5_bench.evidence.observe import work_id
from mmr5_bench.evidence.statistics import latency_summary
from mmr5_bench.mmdocir.metrics import RECALLS
from mmr5_bench.mmdocir.records import OUTCOMES, Record

# Where and how fast it is computed, and what is remembered; not what is asked.
_NOT_WORK = ("device", "dtype", "cache", "limit")
NOT_TIMED = "no list of several pages was answered, so there is no time to report"


def evidence_of(document: Mapping[str, Any]) -> Evidence:
    """The evidence document with the one entry of a results document that has its summary.

    When no list of several pages was answered there is no time to report: it then has a row of
    ``qualities`` instead, and ``skipped`` says so. ``skipped`` names questions that failed, too.
    """
    evidence = new_evidence("MMDocIR page reranking", document["note"], document["machine"])
    evidence["provenance"] = document["provenance"]
    evidence["created"] = document["created"]
    subject, summary = _subject(document), document["summary"]
    timed: list[Record] = [
        record
        for record in document["records"]
        if record["ms"] is not None and len(record["candidates"]) > 1
    ]
    reasons = [summary["failed_note"]] if summary["failed"] else []
    if timed:
        evidence["entries"] = [_entry(document, timed)]
    else:
        reasons.append(NOT_TIMED)
        evidence["qualities"] = [
            {
                "subject": subject,
                "dataset": "MMDocIR pages",
                "axes": _axes(document),
                "quality": _quality(summary),
            }
        ]
    evidence["skipped"] = [{"subject": subject, "reason": reason} for reason in reasons]
    return evidence


def _subject(document: Mapping[str, Any]) -> str:
    engine = document["identity"]["engine"]
    return f"{engine['name']} {engine['quant']}"


def _axes(document: Mapping[str, Any]) -> dict[str, Any]:
    identity, options = document["identity"], document["options"]
    engine = identity["engine"]
    return {
        "workload": "mmdocir",
        "first_stage": identity["candidates"]["first_stage"],
        "pages": identity["candidates"]["k"],
        "quant": engine["quant"],
        "method": engine["method"],
        "dtype": engine["dtype"],
        "device": engine["device"],
        "plan": options["plan"],
        "cache": "cold" if options["cache"] == "off" else "kept",
        "stop": options["stop"],
        "think": options["think"],
    }


def _entry(document: Mapping[str, Any], records: Sequence[Record]) -> Entry:
    identity, options, summary = (document[key] for key in ("identity", "options", "summary"))
    axes = _axes(document)
    described = ",".join(f"{name}={value}" for name, value in axes.items())
    samples = [record["ms"] for record in records if record["ms"] is not None]
    asked = {name: value for name, value in options.items() if name not in _NOT_WORK}
    deciding = [identity[key] for key in ("data", "candidates", "prompt", "pixels")]
    cold = sum(not record["warm"] for record in records)
    notes = [document["note"], summary["failed_note"]]
    if cold:
        notes.append(f"{cold} of {len(records)} times are of a model that had not run before")
    compared = summary.get("against", {}).get("compared", summary["questions"])
    if compared != summary["questions"]:
        notes.append(f"agreement is over the {compared} questions that both runs answered")
    entry: Entry = {
        "name": f"mmdocir[{described}]",
        "subject": _subject(document),
        "axes": axes,
        "work": work_id(deciding, asked, [record["question"] for record in records]),
        "samples_ms": samples,
        "warmup": int(cold == 0),
        "latency_ms": latency_summary(samples),
        "stages_ms": _means([record["stages_ms"] for record in records]),
        "tokens": _means([record["tokens"] or {} for record in records]),
        "quality": _quality(summary),
        "note": "; ".join(text for text in notes if text),
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
    """No macro of a part of the benchmark, which is not to be quoted, and nothing that is None."""
    found: dict[str, Any] = dict(summary["micro"])
    if summary["macro"] is not None:
        found |= {f"macro_{name}": summary["macro"][name] for name in RECALLS}
    found |= {name: summary["rates"][name] for name in OUTCOMES}
    against = summary.get("against")
    if against is not None:
        found["top1_agreement"] = against["first_page"]
        found["order_agreement"] = against["order"]
        found["kendall_tau"] = against["kendall_tau"]
    known = {name: interval for name, interval in found.items() if interval is not None}
    return {"cases": summary["questions"], **known}
