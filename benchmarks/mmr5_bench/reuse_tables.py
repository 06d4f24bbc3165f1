"""The Markdown tables of a ``mmr5-bench reuse`` result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNTRAINED = "†"


def reuse_table(document: Mapping[str, Any]) -> str:
    """All tables that the parts of ``document`` allow, with what was run and where."""
    parts = document["parts"]
    makers = {
        "latency": latency_table,
        "document": document_table,
        "exact": exact_table,
        "approximate": approximate_table,
    }
    present = {name: make for name, make in makers.items() if name in parts}
    made = [f"{make(parts[name])}\n\n{_source(parts[name])}" for name, make in present.items()]
    failed = [e for e in document["expectations"] if not e["holds"]]
    for expectation in failed:
        made.append(f"**Not as expected:** {expectation['what']}, found {expectation['found']}.")
    made.append(
        f"Mini in {document['engine']} with {document['dtype']} arithmetic, at most "
        f"{document['max_new_tokens']} tokens a prompt. {UNTRAINED} mini was never trained on such "
        "prompts or answers, so the row shows what the option saves, and not what it costs a model "
        "that was. Lists of more than 10 pages are longer than any it was trained on."
    )
    return "\n\n".join(made)


def latency_table(part: Mapping[str, Any]) -> str:
    """Time and work by list size and option; medians over lists."""
    head = ["Pages", "Option", "Time", "p95", "First token", "Tokens", "Steps"]
    head += ["Pages read", "Pages encoded", "Tokens saved (estimate)", "Lists"]
    lines = [
        [
            str(row["pages"]),
            _named(row["trial"], row),
            f"{row['ratio']['median']:.2f}",
            f"{row['ratio']['p95']:.2f}",
            f"{row['ttft_ratio']['median']:.2f}" if row["ttft_ratio"] else "",
            *(f"{row[key]:g}" for key in ("tokens", "steps", "prefills", "encodes")),
            # Rows of several samples wrote more than one answer has.
            f"{row['tokens_less']:g} ({row['saved']:g})"
            if row["saved"] and row["ttft_ratio"]
            else "",
            str(row["lists"]),
        ]
        for row in part["rows"]
    ]
    return (
        f"{_table(head, lines, 2)}\n\nTime and time to the first token relative to no reuse and no "
        'stopping (`CacheConfig.off()`, `stop="eos"`, `constrain=False`), list by list; medians '
        "(time also 95th percentile). Time to the first token is the sum of the stages before it, "
        "by the clock where only one token was asked for. Counts are medians, tokens saved with "
        "the result's own estimate in brackets; pages that are moved "
        "count as read, and sampling rows are sums over all samples."
    )


def document_table(part: Mapping[str, Any]) -> str:
    """Work and time of every plan over the document, nothing kept against an open document."""
    head = ["Plan", "Pages", "Questions", "Rounds", "Prompts", "Pages encoded", "Pages read"]
    head += ["Remembered", "Tokens", "Time", "p95", "Same order", "Mask stepped in"]
    lines = [
        [
            row["plan"],
            str(row["pages"]),
            str(row["questions"]),
            str(row["rounds"]),
            str(row["prompts"]),
            *(f"{row['none'][key]:g} → {row['reuse'][key]:g}" for key in ("encodes", "prefills")),
            f"{row['reuse']['prefills_remembered']:g}",
            f"{row['none']['tokens']:g} → {row['reuse']['tokens']:g}",
            f"{row['total_ratio']:.2f}",
            f"{row['ratio']['p95']:.2f}",
            f"{row['same_order']} of {row['questions']}",
            str(row["masked"]),
        ]
        for row in part["rows"]
    ]
    return (
        f"{_table(head, lines, 1)}\n\nAll questions together, with nothing kept and no stopping → "
        "with the defaults (through `open_document`, opening it included). Time relative to the "
        "same plan without; p95 over questions. The order can only differ where the mask stepped "
        "in: mini repeats ids in lists longer than it was trained on. The long list is asked once, "
        "with default stopping in both."
    )


def exact_table(part: Mapping[str, Any]) -> str:
    """How often the exact options gave what full decoding gave."""
    head = ["Option", "Same", "Mask stepped in", "Tokens", "Of full decoding"]
    head += ["Accepted per step", "Accepted of drafted"]
    lines = [
        [
            row["trial"],
            f"{row['same']:,} of {row['lists']:,}",
            str(row["masked"]),
            f"{row['tokens']:.1f}",
            f"{row['tokens_plain']:.1f}",
            f"{row['accepted_per_step']:.2f}" if row["accepted_share"] is not None else "",
            f"{100 * row['accepted_share']:.0f} %" if row["accepted_share"] is not None else "",
        ]
        for row in part["rows"]
    ]
    return (
        f"{_table(head, lines, 1)}\n\nHeld-out lists of 2 to 10 pages. Same: the order; the first "
        "k of it; the text and number of tokens for drafts, which were verified with earlier lists "
        "to draft from. Full decoding has no permutation mask, the default has: it changes the "
        "order only where it stepped in. Top-k answers were replayed from the default's tokens."
    )


def approximate_table(part: Mapping[str, Any]) -> str:
    """What every option costs in agreement and Recall@1, against full decoding."""
    head = ["Option", "Same first", "Same order", "Recall@1", "Change, points"]
    head += ["Tokens", "No answer", "Lists"]
    lines = []
    for row in part["rows"]:
        report = row["report"]
        recall = report["recall"]["1"]
        change = recall["difference"]
        value, low, high = (f"{100 * change[key]:+.1f}" for key in ("value", "low", "high"))
        lines.append(
            [
                _named(row["trial"], row),
                _percent(report["top1"]),
                _percent(report["order"]),
                f"{100 * recall['b']:.1f} %",
                f"{value} [{low}, {high}]",
                f"{row['tokens']:.1f}",
                str(row["fallbacks"]),
                str(row["lists"]),
            ]
        )
    return (
        f"{_table(head, lines, 1)}\n\nAgainst full decoding of one prompt, held-out lists of 2 to "
        "10 pages; 95 % intervals, recall paired. Decoded with drafts, which change no token. "
        "Pages of mini have at most 48 tokens; relocation recomputes the first 4 of each, not 32."
    )


def _named(name: str, row: Mapping[str, Any]) -> str:
    return f"{name} {UNTRAINED}" if row["untrained"] else name


def _percent(share: Mapping[str, float]) -> str:
    value, low, high = (100 * share[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def _source(part: Mapping[str, Any]) -> str:
    origin = part["provenance"]
    return (
        f"{origin['cpu']}, {origin['threads']} thread, torch {origin['torch']}, commit "
        f"{origin['commit']}, load {origin['load']}."
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], texts: int) -> str:
    """Markdown; the first ``texts`` columns to the left, numbers to the right."""
    rule = [":--"] * texts + ["--:"] * (len(head) - texts)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
