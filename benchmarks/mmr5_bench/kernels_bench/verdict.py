"""Whether our int4 kernel is worth its code: the rule, applied to measured rows.

At one row, on the four linears of a decoder layer, ours has to be :data:`KEEP_FACTOR` times as fast
as the best library kernel that is right; otherwise the library is to be used. The rule can only be
decided against the libraries that are made for this, not in their absence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

KEEP_FACTOR = 1.4
KEEP_SHAPES = ("decoder.qkv", "decoder.o_proj", "decoder.gate_up", "decoder.down")
KEEP_FORMAT, KEEP_ROWS = "int4", 1
RIVALS = ("vllm marlin", "humming")
"""Without at least one of them the rule is not decided."""

Decision = Literal["kept", "not kept", "undecided"]


class Duel(TypedDict):
    """One shape: the fastest of ours and of the libraries, medians in ms; None where none was."""

    op: str
    ours: str | None
    ours_ms: float | None
    library: str | None
    library_ms: float | None
    factor: float | None


class Verdict(TypedDict):
    """What the rule says, and of what; ``reason`` is a sentence."""

    decision: Decision
    reason: str
    factor: float
    dry_run: bool
    duels: list[Duel]


def keep_verdict(rows: Sequence[Mapping[str, Any]], *, dry_run: bool) -> Verdict:
    """The rule over ``rows`` of one run; only rows that are right count."""
    duels = [_duel(rows, op) for op in KEEP_SHAPES]
    decision, reason = _decide(rows, duels)
    if dry_run:
        decision, reason = "undecided", "a dry run decides nothing"
    return {
        "decision": decision,
        "reason": reason,
        "factor": KEEP_FACTOR,
        "dry_run": dry_run,
        "duels": duels,
    }


def verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict for people."""
    mark = "DRY RUN, no figures. " if verdict["dry_run"] else ""
    lines = [
        f"{mark}Own int4 kernel at one row, {verdict['factor']:g}x the best library wanted on all "
        f"of {len(verdict['duels'])} shapes: {verdict['decision']} ({verdict['reason']})"
    ]
    for duel in verdict["duels"]:
        ours = _shown(duel["ours"], duel["ours_ms"])
        library = _shown(duel["library"], duel["library_ms"])
        factor = "-" if duel["factor"] is None else f"{duel['factor']:.2f}x"
        lines.append(f"  {duel['op']:<16} {factor:>6}  ours {ours}, best library {library}")
    return lines


def _duel(rows: Sequence[Mapping[str, Any]], op: str) -> Duel:
    mine = _fastest(rows, op, "ours")
    theirs = _fastest(rows, op, "library")
    found: Duel = {
        "op": op,
        "ours": mine and mine[0],
        "ours_ms": mine and mine[1],
        "library": theirs and theirs[0],
        "library_ms": theirs and theirs[1],
        "factor": theirs[1] / mine[1] if mine and theirs else None,
    }
    return found


def _fastest(rows: Sequence[Mapping[str, Any]], op: str, origin: str) -> tuple[str, float] | None:
    found = [(row["kernel"], row["ms"]["value"]) for row in _rows(rows, op, origin)]
    if origin == "library":  # a dense product is a library kernel too
        found += [("cuBLAS dense", row["dense_ms"]["value"]) for row in _rows(rows, op, "ours")]
    return min(found, key=lambda one: one[1], default=None)


def _rows(rows: Sequence[Mapping[str, Any]], op: str, origin: str) -> list[Mapping[str, Any]]:
    return [
        row
        for row in rows
        if row["status"] == "ok"
        and (row["op"], row["format"], row.get("origin", "ours")) == (op, KEEP_FORMAT, origin)
        and row["shape"][0] == KEEP_ROWS
    ]


def _decide(rows: Sequence[Mapping[str, Any]], duels: Sequence[Duel]) -> tuple[Decision, str]:
    if missing := [duel["op"] for duel in duels if duel["ours"] is None]:
        return "undecided", f"no kernel of ours was timed on {', '.join(missing)}"
    for op in KEEP_SHAPES:
        seen = {row["kernel"] for row in _rows(rows, op, "library")}
        if not seen & set(RIVALS):
            return "undecided", f"neither {' nor '.join(RIVALS)} was timed on {op}"
    slow = [duel for duel in duels if duel["factor"] is None or duel["factor"] < KEEP_FACTOR]
    if slow:
        return "not kept", f"too slow on {', '.join(duel['op'] for duel in slow)}: use the library"
    return "kept", "on every shape"


def _shown(name: str | None, ms: float | None) -> str:
    return "not timed" if name is None or ms is None else f"{name} {1e3 * ms:.1f} us"
