"""From the answers of ``mmr5-bench reuse`` to rows, expectations and the result file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from mmr5_bench.provenance import provenance
from mmr5_bench.quantization import draw_case
from mmr5_bench.reuse import DTYPE, LONG, Answers, Scale, code_sha256
from mmr5_bench.reuse_cases import (
    APPROXIMATE,
    BASELINE,
    DETERMINED,
    DOCUMENT,
    DRAFTED,
    FIRST_COLD,
    FIRST_HIT,
    LATENCY,
    MAX_NEW_TOKENS,
    TOP_KS,
    UNMASKED,
    Record,
    Trial,
)
from mmr5_runtime.consistency import CaseOrders, compare_orders

KIND = "mini-reuse"
FEWEST_TIMED = 5
COUNTS = ("tokens", "steps", "prefills", "encodes", "saved")
FULL_HIT = "prompt seen, answer decoded"
NO_ENCODES = ("pages seen, other question", "the same request again", FULL_HIT)


def part_document(scale: Scale, rows: Any, answers: Any) -> dict[str, Any]:
    """One part of the result file, with what each list gave and where the numbers come from."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": {**provenance(), **machine(), "code": code_sha256()[:16]},
        "scale": asdict(scale),
        "rows": rows,
        "records": records(answers),
    }


def reuse_document(engine: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The result file; ``parts`` by name, in whatever runs they were made."""
    return {
        "kind": KIND,
        "note": "mini on synthetic held-out pages; says nothing about MM-R5. Mini was trained on "
        "lists of 2 to 10 pages, question first, with its reasoning in full.",
        "engine": engine,
        "dtype": DTYPE,
        "max_new_tokens": MAX_NEW_TOKENS,
        "baseline": {**BASELINE.options, "cache": "CacheConfig.off()"},
        "options": {t.name: {**t.options, "top_k": t.top_k} for s in LATENCY for t in s.trials},
        "expectations": expectations({name: part["rows"] for name, part in parts.items()}),
        "parts": dict(parts),
    }


def machine() -> dict[str, str]:
    """The processor by name, its cores, threads used, and how busy it was."""
    name = "unknown"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        name = names[0] if names else name
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    threads = str(torch.get_num_threads())
    return {"cpu": name, "cores": str(os.cpu_count()), "threads": threads, "load": load}


def latency_rows(found: Mapping[int, Sequence[Answers]]) -> list[dict[str, Any]]:
    """One row per list size and trial, in the order of the trials; ratios are list by list."""
    made = []
    for size, lists in found.items():
        for trial in (trial for session in LATENCY for trial in session.trials):
            pairs = [(one[trial.name], one[BASELINE.name]) for one in lists if trial.name in one]
            if not pairs:
                continue
            k = trial.top_k or size
            made.append(
                {
                    "pages": size,
                    "trial": trial.name,
                    "untrained": trial.untrained,
                    "lists": len(pairs),
                    "ms": median(own.ms for own, _ in pairs),
                    "ratio": spread([own.ms / base.ms for own, base in pairs]),
                    "ttft_ratio": _first_token(trial, lists),
                    "same_first": sum(_same_first(own, base, k) for own, base in pairs),
                    "masked": sum(own.interventions > 0 for own, _ in pairs),
                    "unexplained": sum(_unexplained(own, base, k) for own, base in pairs),
                    **{key: median(getattr(own, key) for own, _ in pairs) for key in COUNTS},
                    "tokens_less": median(base.tokens - own.tokens for own, base in pairs),
                }
            )
    return made


def _first_token(trial: Trial, lists: Sequence[Answers]) -> dict[str, float] | None:
    """Time to the first token relative to reading everything; None for several samples.

    By the stages of the request, but where only one token was asked for by the clock.
    """
    asked = [one for one in lists if trial.name in one]
    if trial.separate > 1 or "samples" in trial.options:
        return None
    if trial in (FIRST_COLD, FIRST_HIT):
        return spread([one[trial.name].ms / one[FIRST_COLD.name].ms for one in asked])
    return spread([one[trial.name].ttft_ms / one[BASELINE.name].ttft_ms for one in asked])


def document_rows(found: Mapping[str, Sequence[Answers]]) -> list[dict[str, Any]]:
    """One row per plan and one for the long list; sums over the questions of a document."""
    made = []
    for trial in [trial.name for trial in DOCUMENT] + [LONG]:
        if trial not in found:
            continue
        none = [one["none"] for one in found[trial]]
        reuse = [one["reuse"] for one in found[trial]]
        made.append(
            {
                "plan": trial,
                "pages": len(none[0].order),
                "questions": len(none),
                "rounds": max(record.rounds for record in reuse),
                "prompts": sum(record.prompts for record in reuse),
                "none": _sums(none),
                "reuse": _sums(reuse),
                "ratio": spread([o.ms / n.ms for o, n in zip(reuse, none, strict=True)]),
                "total_ratio": sum(r.ms for r in reuse) / sum(r.ms for r in none),
                "same_order": sum(o.order == n.order for o, n in zip(reuse, none, strict=True)),
                "masked": sum(record.interventions > 0 for record in reuse),
            }
        )
    return made


def exact_rows(lists: Sequence[Answers]) -> list[dict[str, Any]]:
    """``same`` out of ``lists`` for every exact option, and what it saved."""
    pairs = {
        name: [(one[name], one[BASELINE.name]) for one in lists if name in one]
        for name in (DETERMINED.name, UNMASKED.name, *(f"top_k={k}" for k in TOP_KS), DRAFTED.name)
    }
    same: dict[str, Callable[[Record, Record], bool]] = {
        DETERMINED.name: lambda own, base: own.order == base.order,
        UNMASKED.name: lambda own, base: own.order == base.order,
        **{f"top_k={k}": partial(_same_first, k=k) for k in TOP_KS},
        DRAFTED.name: lambda own, base: (own.text, own.tokens) == (base.text, base.tokens),
    }
    made = []
    for name, compared in pairs.items():
        if not compared:
            continue
        flags = [same[name](own, base) for own, base in compared]
        own = [record for record, _ in compared]
        steps = sum(record.steps for record in own)
        made.append(
            {
                "trial": name,
                "lists": len(compared),
                "same": sum(flags),
                "different": [index for index, flag in enumerate(flags) if not flag],
                "unexplained": sum(
                    not flag and not record.interventions
                    for flag, record in zip(flags, own, strict=True)
                ),
                "tokens": sum(record.tokens for record in own) / len(own),
                "tokens_plain": sum(base.tokens for _, base in compared) / len(own),
                "replayed": sum(record.replayed for record in own),
                "masked": sum(record.interventions > 0 for record in own),
                "accepted_per_step": sum(record.accepted for record in own) / steps if steps else 0,
                "accepted_share": _share(own),
            }
        )
    return made


def approximate_rows(lists: Sequence[Answers], seed: int) -> list[dict[str, Any]]:
    """Agreement of every trial with full decoding, with a consistency report each."""
    made = []
    for trial in APPROXIMATE:
        if trial is BASELINE:
            continue
        numbered = [(i, one) for i, one in enumerate(lists) if trial.name in one]
        if not numbered:
            continue
        cases = [
            CaseOrders(one[BASELINE.name].order, one[trial.name].order, draw_case(i, seed).gold)
            for i, one in numbered
        ]
        own = [one[trial.name] for _, one in numbered]
        made.append(
            {
                "trial": trial.name,
                "untrained": trial.untrained,
                "lists": len(cases),
                "fallbacks": sum(record.status == "fallback" for record in own),
                "reasoned": sum(record.reasoning_end != "skipped" for record in own),
                "tokens": sum(record.tokens for record in own) / len(own),
                "report": compare_orders(cases).to_json(),
            }
        )
    return made


def expectations(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What has to come out of a run, for the parts that were run; ``holds`` says whether it did.

    A list that the model got wrong (an id twice, say) is written otherwise under the mask, which
    counts as an intervention; any other difference from full decoding is unexplained. Times are
    judged from :data:`FEWEST_TIMED` lists on.
    """
    made: list[dict[str, Any]] = []

    def expect(what: str, found: Any, holds: bool) -> None:
        made.append({"what": what, "found": found, "holds": holds})

    latency = rows.get("latency", ())
    for row in latency:
        what = f"{row['pages']} pages, {row['trial']}"
        if row["trial"] in NO_ENCODES:
            expect(f"{what}: no page is encoded", row["encodes"], row["encodes"] == 0)
        if row["trial"] == FIRST_HIT.name and row["lists"] >= FEWEST_TIMED:
            ratio = row["ttft_ratio"]["median"]
            expect(f"{what}: within 10 % of cold", round(ratio, 4), ratio <= 0.10)
        if row["trial"].startswith("top_k=") or row["trial"] == DETERMINED.name:
            lost = row["unexplained"]
            expect(f"{what}: lists with other first candidates", lost, lost == 0)
    for row in rows.get("document", ()):
        if row["plan"] == LONG:
            for memory in ("none", "reuse"):
                encodes = row[memory]["encodes"]
                what = f"sliding over {row['pages']} pages ({memory}): each is encoded once"
                expect(what, encodes, encodes == row["pages"])
    for row in rows.get("exact", ()):
        what = f"{row['trial']}: lists of {row['lists']} that differ from full decoding"
        expect(what, row["unexplained"], row["unexplained"] == 0)
        if row["trial"] == DETERMINED.name:
            expect(f"{row['trial']}: decoded for real", row["replayed"], row["replayed"] == 0)
    return made


def records(answers: Any) -> Any:
    """Answers as JSON has them, numbers in columns: a list of lists, or a mapping to such."""
    if isinstance(answers, Mapping):
        return {str(key): records(value) for key, value in answers.items()}
    names = list(dict.fromkeys(name for one in answers for name in one))
    return {
        name: _columns([asdict(one[name]) if name in one else None for one in answers])
        for name in names
    }


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    return {"median": median(ratios), "p95": float(np.quantile(ratios, 0.95))}


def _columns(rows: Sequence[Mapping[str, Any] | None]) -> dict[str, list[Any]]:
    """Values by field, None where a list was not asked; ``order`` as text."""
    fields = next((row for row in rows if row is not None), {})
    columns = {field: [row and row[field] for row in rows] for field in fields}
    columns["order"] = [order and " ".join(map(str, order)) for order in columns["order"]]
    return columns


def _same_first(own: Record, base: Record, k: int) -> bool:
    return own.order[:k] == base.order[:k]


def _unexplained(own: Record, base: Record, k: int) -> bool:
    return not _same_first(own, base, k) and not own.interventions


def _sums(records: Iterable[Record]) -> dict[str, float]:
    rows = list(records)
    keys = ("encodes", "prefills", "prefills_remembered", "tokens", "ms")
    return {key: sum(getattr(row, key) for row in rows) for key in keys}


def _share(records: Sequence[Record]) -> float | None:
    drafted = sum(record.drafted for record in records)
    return sum(record.accepted for record in records) / drafted if drafted else None
