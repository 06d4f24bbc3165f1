"""The figures of a run, and of two runs on the same lists, from their records alone.

Recall, nDCG and MRR stand as micro and macro averages with intervals clustered by document, next
to the first stage on the same lists and to what a perfect ranker could reach. The macro average of
a part of the questions is divided by ten all the same, so it stands under another name
(``macro_of_subset``) and is not to be quoted. What looks beyond the places that a run with
``top_k`` ranked is None: the rest of such an order is that of the input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmr5_bench.evidence.statistics import Interval, latency_summary, share_interval
from mmr5_bench.mmdocir.annotations import DOMAINS
from mmr5_bench.mmdocir.bootstrap import Clusters
from mmr5_bench.mmdocir.metrics import (
    KS,
    METRICS,
    RECALLS,
    SINGLE_DOCUMENT_DOMAIN,
    ceiling_at,
    macro,
    micro,
    needs_more,
)
from mmr5_bench.mmdocir.records import OUTCOMES, Record, ranked
from mmr5_bench.mmdocir.results import check_comparable
from mmr5_runtime.agreement import kendall_tau, top1

Values = Mapping[str, Sequence[float] | None]
"""One value per question, by metric; None for a metric of more places than were ranked."""


def summarise(
    document: Mapping[str, Any], reference: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All figures of a results document; with ``reference``, ``against`` it under that key.

    ValueError when the two are not of the same lists, prompts and pixels.
    """
    records: list[Record] = document["records"]
    domains = [record["domain"] for record in records]
    clusters = Clusters([record["document"] for record in records], domains)
    subset = len(records) != document["identity"]["data"]["questions"]
    partial = subset or set(domains) != set(DOMAINS)
    places = _ranked_places(document)
    values = _values(records, places)
    first = _values([_unranked(record) for record in records], None)
    measured = [record for record in records if record["status"] != "error"]
    summary: dict[str, Any] = {
        "questions": len(records),
        "documents": len({record["document"] for record in records}),
        "subset": partial,
        "failed": len(records) - len(measured),
        "failed_note": failed_note(records),
        "ranked_places": places,
        "without_gold": sum(not record["gold"] for record in records),
        **_averages(clusters, values, partial),
        "domains": _domains(records, values),
        "first_stage": _averages(clusters, first, partial),
        "over_first_stage": _averages(clusters, _minus(values, first), partial),
        "ceilings": _ceilings(records, domains),
        "rates": {
            status: share_interval([record["status"] == status for record in records])
            for status in OUTCOMES
        },
        "errors": _errors(records),
        "stop_reasons": _counted(str(record["stop_reason"]) for record in measured),
        "exactness": _counted(str(record["exactness"]) for record in measured),
        "interventions": sum(record["interventions"] for record in records),
        "tokens": _tokens(measured),
        "latency_ms": _latency(measured),
    }
    if reference is not None:
        check_comparable(document, reference)
        summary["against"] = _against(document, reference, clusters, partial)
    return summary


def failed_note(records: Sequence[Record]) -> str:
    """What questions without an answer do to the figures; empty when there is none."""
    failed = sum(record["status"] == "error" for record in records)
    if not failed:
        return ""
    return (
        f"{failed} of {len(records)} questions could not be asked; they count with the first "
        "stage's order"
    )


def _ranked_places(document: Mapping[str, Any]) -> int | None:
    """How many places the run ranked; None for all of them."""
    top_k: int | None = document["options"]["top_k"]
    return top_k if top_k is not None and top_k < document["identity"]["candidates"]["k"] else None


def _values(records: Sequence[Record], places: int | None) -> Values:
    return {
        name: None if needs_more(name, places) else [of(ranked(record)) for record in records]
        for name, of in METRICS.items()
    }


def _unranked(record: Record) -> Record:
    return {**record, "order": record["candidates"]}


def _minus(values: Values, others: Values) -> Values:
    found: dict[str, list[float] | None] = {}
    for name in values:
        left, right = values[name], others[name]
        if left is None or right is None:
            found[name] = None
        else:
            found[name] = [a - b for a, b in zip(left, right, strict=True)]
    return found


def _averages(clusters: Clusters, values: Values, partial: bool) -> dict[str, Any]:
    """Micro and macro; the macro of a part of the benchmark under a name that says so."""

    def each(average: Callable[[Sequence[float]], Interval]) -> dict[str, Interval | None]:
        return {name: None if found is None else average(found) for name, found in values.items()}

    over_ten = each(clusters.macro)
    without = each(lambda found: clusters.macro(found, without=[SINGLE_DOCUMENT_DOMAIN]))
    if partial:
        return {"micro": each(clusters.micro), "macro": None, "macro_of_subset": over_ten}
    return {"micro": each(clusters.micro), "macro": over_ten, "macro_without_news": without}


def _domains(records: Sequence[Record], values: Values) -> list[dict[str, Any]]:
    rows = []
    for name in DOMAINS:
        places = [index for index, record in enumerate(records) if record["domain"] == name]
        row: dict[str, Any] = {
            "domain": name,
            "documents": len({records[index]["document"] for index in places}),
            "questions": len(places),
        }
        for metric, found in values.items():
            if found is None:
                row[metric] = None
            else:
                row[metric] = micro([found[index] for index in places]) if places else 0.0
        rows.append(row)
    return rows


def _ceilings(records: Sequence[Record], domains: Sequence[str]) -> dict[str, Any]:
    """recall@k of a perfect ranker, over whole documents and over the candidates."""
    found: dict[str, Any] = {"document": {}, "candidates": {}}
    for k in KS:
        whole = [ceiling_at(record["gold"], k) for record in records]
        listed = [ceiling_at(record["gold"], k, record["candidates"]) for record in records]
        for name, values in (("document", whole), ("candidates", listed)):
            found[name][f"recall@{k}"] = {"micro": micro(values), "macro": macro(values, domains)}
    return found


def _errors(records: Sequence[Record]) -> dict[str, Any]:
    """How many of each type, and the message of the first of it."""
    found: dict[str, Any] = {}
    for record in records:
        error = record["error"]
        if error is not None:
            example = {"question": record["question"], "message": error["message"]}
            found.setdefault(error["type"], {"count": 0, "first": example})["count"] += 1
    return found


def _counted(names: Any) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _tokens(measured: Sequence[Record]) -> dict[str, dict[str, float]]:
    found = {}
    for name in ("prompt", "image", "completion"):
        counts = [record["tokens"][name] for record in measured if record["tokens"]]
        if counts:
            p95 = float(np.quantile(counts, 0.95))
            found[name] = {"mean": micro(counts), "p95": p95, "max": float(max(counts))}
    return found


def _latency(measured: Sequence[Record]) -> dict[str, Any]:
    """Over all questions, and under its number of pages those of each length of list.

    A list of one page is not asked of the model and left out of ``all``.
    """
    by_length: dict[int, list[float]] = {}
    for record in measured:
        if record["ms"] is not None:
            by_length.setdefault(len(record["candidates"]), []).append(record["ms"])
    asked = [ms for length, found in by_length.items() if length > 1 for ms in found]
    groups = [("all", asked), *((str(length), by_length[length]) for length in sorted(by_length))]
    return {
        name: {"questions": len(found), **latency_summary(found)} for name, found in groups if found
    }


def _against(
    document: Mapping[str, Any], reference: Mapping[str, Any], clusters: Clusters, partial: bool
) -> dict[str, Any]:
    """Agreement, and paired differences, document minus reference, question by question.

    Agreement is over the questions ``compared``, which both answered: two runs that failed agree on
    the order of the first stage. Differences are over all, as the averages are.
    """
    records, others = document["records"], reference["records"]
    limits = [_ranked_places(one) for one in (document, reference)]
    differences = _minus(_values(records, limits[0]), _values(others, limits[1]))
    depth = min((limit for limit in limits if limit is not None), default=None)
    return {
        "reference": {key: reference[key] for key in ("note", "identity", "options", "run")},
        "compared_places": depth,
        **_agreement(records, others, depth),
        "differences": _averages(clusters, differences, partial),
        "changed": {
            name: {
                "better": sum(value > 0 for value in found),
                "worse": sum(value < 0 for value in found),
            }
            for name in RECALLS
            if (found := differences[name]) is not None
        },
        "errors": [sum(r["status"] == "error" for r in one) for one in (records, others)],
    }


def _agreement(
    records: Sequence[Record], others: Sequence[Record], depth: int | None
) -> dict[str, Any]:
    """Shares of the ``compared`` questions; None each when there is no such question.

    When a run ranked only its first ``depth`` places, orders are compared as far as that, and
    Kendall's tau, which is of whole orders, is None.
    """
    both = [
        (a, b)
        for a, b in zip(records, others, strict=True)
        if "error" not in (a["status"], b["status"])
    ]
    names = ("first_page", "order", "kendall_tau", "same_text")
    found: dict[str, Any] = {"compared": len(both), **dict.fromkeys(names)}
    if not both:
        return found
    clusters = Clusters([a["document"] for a, _ in both], [a["domain"] for a, _ in both])
    orders = [(a["order"], b["order"]) for a, b in both]
    found["first_page"] = clusters.micro([float(top1(a, b)) for a, b in orders])
    found["order"] = clusters.micro([float(a[:depth] == b[:depth]) for a, b in orders])
    if depth is None:
        found["kendall_tau"] = clusters.micro([kendall_tau(a, b) for a, b in orders])
    same = [a["text_sha256"] is not None and a["text_sha256"] == b["text_sha256"] for a, b in both]
    found["same_text"] = clusters.micro([float(flag) for flag in same])
    return found
