"""The model card of an engine folder, made from the document of ``report.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from mmr5_export.agreement import ORIGINAL, reference_name
from mmr5_export.estimate import gigabytes


def model_card(document: Mapping[str, Any]) -> str:
    """``README.md``: front matter for hubs, then Markdown. Equal documents give equal text.

    No licence is stated: that of the source checkpoint holds, and this tool does not know it.
    """
    quant, source = document["quant"], document["source"]
    method = "" if quant["method"] in ("none", quant["name"]) else f" by {quant['method']}"
    sections = [
        _front_matter(document),
        f"# {source['name']}, {quant['name']}",
        f"An engine folder of mmr5-runtime: `{source['name']}` stored as {quant['name']}{method}, "
        f"{gigabytes(document['bytes'])} of weights instead of "
        f"{gigabytes(document['bf16_bytes'])} in "
        "bf16. It ranks document pages, given as images, for a question.",
        "The licence of the source checkpoint holds.",
        "## What it lost",
        _losses(document),
        _worst(document),
        "## How it was made",
        _making(document),
        "## How to use it",
        "```python\nfrom mmr5_runtime import Reranker\n\n"
        'with Reranker.load("path/to/this/folder") as reranker:\n'
        '    result = reranker.rerank("Which chart shows rainfall?", ["a.png", "b.png"])\n'
        "print(result.order, result.status)\n```",
        _backends(document),
        "## Limits",
        _limits(document),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(document: Mapping[str, Any]) -> str:
    quant, name = document["quant"], document["source"]["name"]
    tags = ["mmr5-runtime", "qwen2_5_vl", "document-reranking", quant["name"], quant["method"]]
    lines = []
    if "/" in name:  # a hub id: folders are recorded by their last name only
        lines.append(f"base_model: {name}")
        if quant["layers"]:
            lines.append("base_model_relation: quantized")
    lines += ["library_name: mmr5-runtime", "tags:"]
    lines += [f"- {tag}" for tag in dict.fromkeys(tags) if tag != "none"]
    return "\n".join(["---", *lines, "---"])


def _losses(document: Mapping[str, Any]) -> str:
    verification = document["verification"]
    if verification is None:
        reason = document.get("unverified") or "the export ran without verification"
        return f"Not measured: {reason.rstrip('.')}."
    tokens, ranks = verification["tokens"], verification["ranks"]
    lists, copy = ranks["lists"], ranks["reference_by"] != ORIGINAL
    token_rows = [
        (
            "Perplexity",
            _perplexity(tokens["reference_perplexity"]),
            _perplexity(tokens["perplexity"]),
        ),
        ("KL per token, nats", "", f"{tokens['kl_nats']:.3g}"),
        ("Same next token", "", f"{_percent(tokens['next_token_agreement'])}"),
    ]
    rank_rows = [
        ("Same first page", "", _of(ranks["first_choice_agreement"], lists)),
        ("Same order", "", _of(ranks["order_agreement"], lists)),
        ("Kendall tau", "", f"{ranks['kendall_tau']:.3f}"),
    ]
    rank_rows += [
        (f"Recall@{k}", f"{pair['reference']:.3f}", f"{pair['engine']:.3f}")
        for k, pair in ranks["recall"].items()
    ]
    formed = ranks["well_formed"]
    rank_rows.append(
        ("Well-formed answers", _of(formed["reference"], lists), _of(formed["engine"], lists))
    )
    threshold = verification["min_top1_agreement"]
    verdict = ""
    if threshold is not None:
        reached = "is reached" if verification["passed"] else "**is not reached**"
        verdict = f" The asked first-page agreement of {threshold:g} {reached}."
    if not copy:
        return (
            f"{_table('original', [*token_rows, *rank_rows])}\n\n"
            f"{lists} lists kept apart from calibration; {tokens['tokens']:,} tokens of the "
            "original's own answers for the first three rows; rankings are each engine's own "
            f"greedy answer.{verdict}"
        )
    name = reference_name(ranks["reference_by"])
    return (
        f"{_table('original', token_rows)}\n\n"
        f"{_table(name, rank_rows)}\n\n"
        f"{lists} lists kept apart from calibration, answered by {name}, because the memory did "
        "not hold the original itself while it wrote. The first table compares with the original "
        f"on the {tokens['tokens']:,} tokens of those answers, the second with the rankings of "
        f"the copy.{verdict}"
    )


def _table(reference: str, rows: Sequence[tuple[str, str, str]]) -> str:
    lines = [f"| on held-out lists | {reference} | this engine |", "| :-- | --: | --: |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _worst(document: Mapping[str, Any]) -> str:
    layers, worst = document["layers"], document["worst_layers"]
    known = [layer["sqnr_db"] for layer in layers.values() if layer.get("sqnr_db") is not None]
    if not known:
        return ""
    rows = "\n".join(
        f"| `{name}` | {layers[name]['format']} | {_or_dash(layers[name].get('sqnr_db'), '.1f')} | "
        f"{_or_dash(layers[name].get('error'), '.2e')} |"
        for name in worst
    )
    return (
        f"Signal to quantization noise of the {len(known)} quantized weights: median "
        f"{median(known):.1f} dB, lowest {min(known):.1f} dB. The layers that lost most:\n\n"
        f"| layer | format | SQNR dB | output error |\n| :-- | :-- | --: | --: |\n{rows}"
    )


def _making(document: Mapping[str, Any]) -> str:
    source, calibration = document["source"], document["calibration"]
    revision = f" at revision `{source['revision']}`" if source["revision"] else ""
    lines = [
        f"```\n{document['command']}\n```",
        f"From `{source['name']}`{revision}; the sha256 of every source file, the settings of "
        "every layer and the versions of all tools are in `report.json`. Seed: "
        f"{'none' if document['seed'] is None else document['seed']}. "
        f"{', '.join(f'{tool} {version}' for tool, version in document['versions'].items())}.",
    ]
    if calibration is not None:
        details = "\n".join(
            f"| {key.replace('_', ' ')} | {_plain(value)} |"
            for key, value in calibration.items()
            if value is not None
        )
        lines.append(f"| calibration | |\n| :-- | :-- |\n{details}")
    return "\n\n".join(lines)


def _backends(document: Mapping[str, Any]) -> str:
    """Per file set for another engine, exactly what was verified of it."""
    rows = []
    for name, found in document.get("backends", {}).items():
        targets = found.get("targets")
        if targets is None:
            rows.append((name, "this folder", found["verified"]))
            continue
        for target, facts in targets.items():
            rows.append((f"{name}, {target}", f"`{facts['folder']}`", facts["verified"]))
    if not rows:
        return ""
    lines = ["| for | where | verified |", "| :-- | :-- | :-- |"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "## Other engines\n\n" + "\n".join(lines)


def _limits(document: Mapping[str, Any]) -> str:
    limits = [
        "One architecture (Qwen2.5-VL), one task: rank these pages for this question. The score of "
        "a page is its rank and cannot be compared between lists.",
        "The figures above are of the lists they were measured on; pages of another kind can "
        "behave otherwise.",
    ]
    if document["quant"]["name"].startswith("int4"):
        limits.append(
            "Four-bit weights cost generated reasoning more than they cost reading; watch the "
            "rankings, not the perplexity."
        )
    if document["source"]["name"] == "mini":
        limits.append("mini is a toy on synthetic pages; its figures say nothing about MM-R5.")
    return "\n".join(f"- {limit}" for limit in limits)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(part)}" for key, part in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def _perplexity(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.5g}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _of(share: float, count: int) -> str:
    return f"{round(share * count):,} of {count:,}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
