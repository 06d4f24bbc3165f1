"""From outcomes to the result file of ``mmr5-bench quantization``, and to its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

from mmr5_bench.metrics import (
    bootstrap_interval,
    bootstrap_ratio_interval,
    recall_at,
    wilson_interval,
)
from mmr5_bench.minidocs.lists import RerankCase
from mmr5_bench.outcomes import Key, Outcome
from mmr5_bench.provenance import provenance
from mmr5_bench.quantization import LIST_SIZES, MAX_NEW_TOKENS, Contender, draw_case
from mmr5_export.agreement import KS
from mmr5_kernels.layout import GROUP_SIZE
from mmr5_runtime.manifest import Manifest

KIND = "minidocs-quantization"
COMPARED = ("next_token", "first_choice", "order")


def quantization_document(
    reference: Contender,
    engines: Sequence[Contender],
    outcomes: Mapping[Key, Outcome],
    *,
    num_cases: int,
    seed: int,
    dtype: str,
) -> dict[str, Any]:
    """The result file as JSON."""
    cases = [draw_case(index, seed) for index in range(num_cases)]
    return {
        "kind": KIND,
        "note": "mini on synthetic held-out pages; says nothing about MM-R5",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "dtype": dtype,
        "cases": num_cases,
        "list_sizes": [LIST_SIZES[0], LIST_SIZES[-1]],
        "max_new_tokens": MAX_NEW_TOKENS,
        "provenance": provenance(),
        "gold": ["".join(str(page) for page in case.gold) for case in cases],
        "rows": rows(cases, reference, engines, outcomes),
    }


def rows(
    cases: Sequence[RerankCase],
    reference: Contender,
    engines: Sequence[Contender],
    outcomes: Mapping[Key, Outcome],
) -> list[dict[str, Any]]:
    """One row per engine, the reference first, with 95 % intervals and what each case gave."""
    listed = [reference, *(engine for engine in engines if engine.path != reference.path)]
    found = [[outcomes[i, engine.key] for i in range(len(cases))] for engine in listed]
    made = []
    for engine, own in zip(listed, found, strict=True):
        row = {
            "engine": engine.path.name,
            "label": label(engine.manifest),
            "quant": engine.manifest.quant_name,
            "method": engine.manifest.quant.method,
            "weights_bytes": weights_bytes(engine.manifest),
            "sqnr_db": sqnr_range(engine.manifest),
            "metrics": metrics(cases, own, found[0]),
            "records": records(own),
        }
        nearest = _rounded_alike(engine, listed)
        if nearest is not None:
            row["kl_minus_rtn"] = _kl_difference(own, found[nearest])
        made.append(row)
    return made


def metrics(
    cases: Sequence[RerankCase], own: Sequence[Outcome], reference: Sequence[Outcome]
) -> dict[str, Any]:
    """``value``, ``low`` and ``high`` of every measure; recalls also their paired ``difference``.

    Means over tokens are redrawn by whole cases; shares of cases have Wilson's interval.
    """
    tokens = [o.tokens for o in own]
    measured: dict[str, Any] = {
        "kl": _ratio([o.kl for o in own], tokens),
        "next_token": _ratio([o.agreeing for o in own], tokens),
        "first_choice": _share([o.order[0] == r.order[0] for o, r in _both(own, reference)]),
        "order": _share([o.order == r.order for o, r in _both(own, reference)]),
        "well_formed": _share([o.status == "ok" for o in own]),
    }
    for k in KS:
        values = [recall_at(o.order, case.gold, k) for case, o in zip(cases, own, strict=True)]
        others = [
            recall_at(r.order, case.gold, k) for case, r in zip(cases, reference, strict=True)
        ]
        gained = [value - other for value, other in zip(values, others, strict=True)]
        measured[f"recall@{k}"] = {**_mean(values), "difference": _mean(gained)}
    return measured


def label(manifest: Manifest) -> str:
    """What was asked for, as far as it differs from what the name implies."""
    layers = manifest.formats
    decoder = [f for name, f in layers.items() if name.startswith("model.")]
    vision = sorted({f.weights for name, f in layers.items() if name.startswith("visual.")})
    sizes = sorted({f.group_size for f in decoder if f.group_size} - {GROUP_SIZE})
    head = layers.get("lm_head")
    method = manifest.quant.method
    words = [manifest.quant_name, "" if method == "none" else method]
    words += [f"g{size}" for size in sizes]
    words += ["asym"] if any(not f.symmetric for f in decoder) else []
    if decoder and (head is None or head.weights != "int8"):
        words.append(f"head {'bf16' if head is None else head.weights}")
    words += [f"vision {weights}" for weights in vision]
    return " ".join(word for word in words if word)


def weights_bytes(manifest: Manifest) -> int:
    """Size of the files that hold tensors."""
    return sum(manifest.files[name].size for name in set(manifest.tensors.values()))


def sqnr_range(manifest: Manifest) -> dict[str, float] | None:
    """Median and lowest over the quantized linears; None when none lost anything."""
    known = [db for db in manifest.report.get("sqnr_db", {}).values() if db is not None]
    return {"median": median(known), "lowest": min(known)} if known else None


def records(own: Sequence[Outcome]) -> dict[str, list[Any]]:
    """What each case gave, in order of cases: enough for any other metric or interval.

    ``order`` is a string of digits, one per page.
    """
    return {
        "order": ["".join(str(page) for page in o.order) for o in own],
        "status": [o.status for o in own],
        "stop_reason": [o.stop_reason for o in own],
        "completion_tokens": [o.completion_tokens for o in own],
        "tokens": [o.tokens for o in own],
        "kl": [float(f"{o.kl:.6g}") for o in own],
        "nll": [float(f"{o.nll:.6g}") for o in own],
        "agreeing": [o.agreeing for o in own],
    }


def quantization_table(document: Mapping[str, Any]) -> str:
    """Markdown table of a result file, one row per engine."""
    head = ["Engine", "MB", "SQNR dB", "KL", "Next token", "First page", "Order"]
    head += [f"Recall@{k}" for k in KS] + ["Well-formed"]
    lines = [head, [":--"] + ["--:"] * (len(head) - 1)]
    for number, row in enumerate(document["rows"]):
        found, sqnr = row["metrics"], row["sqnr_db"]
        cells = [
            row["label"],
            f"{row['weights_bytes'] / 1e6:.1f}",
            f"{sqnr['median']:.1f} / {sqnr['lowest']:.1f}" if sqnr else "",
            _kl_cell(found["kl"]) if number else "",
        ]
        cells += [_percent(found[key]) if number else "" for key in COMPARED]
        cells += [_recall(found[f"recall@{k}"], number > 0) for k in KS]
        lines.append([*cells, _percent(found["well_formed"])])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    low, high = document["list_sizes"]
    return (
        f"{table}\n\n{document['cases']:,} held-out lists of {low} to {high} pages, seed "
        f"{document['seed']}, greedy, {document['dtype']} arithmetic. SQNR of the weights: median "
        "and lowest. KL per token of the bf16 answer, in nats; next token, first page and order: "
        "agreement with bf16. 95 % intervals in brackets; behind a recall its difference to bf16, "
        f"paired. Commit {document['provenance']['commit']}."
    )


def _kl_cell(metric: Mapping[str, float]) -> str:
    return f"{metric['value']:.2g} [{metric['low']:.2g}, {metric['high']:.2g}]"


def _percent(metric: Mapping[str, float]) -> str:
    value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def _recall(metric: Mapping[str, Any], compared: bool) -> str:
    if not compared:
        return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"
    value, low, high = (f"{metric['difference'][key]:+.3f}" for key in ("value", "low", "high"))
    return f"{metric['value']:.3f}, {value} [{low}, {high}]"


def _rounded_alike(engine: Contender, listed: Sequence[Contender]) -> int | None:
    """The engine with the same formats whose codes are round to nearest, if there is another."""
    for index, other in enumerate(listed):
        alike = other.manifest.formats == engine.manifest.formats
        if alike and other.manifest.quant.method == "rtn" != engine.manifest.quant.method:
            return index
    return None


def _kl_difference(own: Sequence[Outcome], rounded: Sequence[Outcome]) -> dict[str, float]:
    gained = [o.kl - r.kl for o, r in _both(own, rounded)]
    return _ratio(gained, [o.tokens for o in own])


def _both(own: Sequence[Outcome], other: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    return list(zip(own, other, strict=True))


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    low, high = bootstrap_ratio_interval(numerators, denominators)
    return {"value": sum(numerators) / sum(denominators), "low": low, "high": high}


def _mean(values: Sequence[float]) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {"value": sum(values) / len(values), "low": low, "high": high}


def _share(flags: Sequence[bool]) -> dict[str, float]:
    low, high = wilson_interval(sum(flags), len(flags))
    return {"value": sum(flags) / len(flags), "low": low, "high": high}
