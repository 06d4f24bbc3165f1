"""What a run of checks says of each kernel, and the record that ``proven.json`` keeps of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

State = Literal["right", "failed", "unfinished"]


class Checked(TypedDict):
    """One check: ``status`` is ``right``, ``wrong``, ``error`` or ``not run``; ``error`` None where
    there is no number, or one that is not finite."""

    name: str
    kernels: list[str]
    status: Literal["right", "wrong", "error", "not run"]
    error: float | None
    allowed: float | None
    reason: str


def states(checked: Sequence[Checked]) -> dict[str, State]:
    """Of every kernel that checks speak for: right when all of its checks ran and were right."""
    found: dict[str, State] = {}
    for kernel in sorted({name for one in checked for name in one["kernels"]}):
        own = {one["status"] for one in checked if kernel in one["kernels"]}
        if own & {"wrong", "error"}:
            found[kernel] = "failed"
        else:
            found[kernel] = "unfinished" if "not run" in own else "right"
    return found


def new_record(
    before: Mapping[str, Any],
    capability: tuple[int, int],
    found: Mapping[str, State],
    *,
    commit: str,
    date: str,
) -> dict[str, Any]:
    """``proven.json`` with this GPU's entry replaced by the kernels proven now.

    Kernels that an earlier run proved on it and this one did not are gone: the code has changed.
    Entries of other GPUs stay. Without a proven kernel the entry goes away.
    """
    name = "sm_{}{}".format(*capability)
    kept = {other: record for other, record in before.items() if other != name}
    proven = sorted(kernel for kernel, state in found.items() if state == "right")
    if proven:
        kept[name] = {"commit": commit, "date": date, "kernels": proven}
    return dict(sorted(kept.items()))


def lines(checked: Sequence[Checked], found: Mapping[str, State], *, dry_run: bool) -> list[str]:
    """What was wrong or not run, and every kernel, for people."""
    shown = []
    for one in checked:
        if one["status"] == "right":
            continue
        off = "" if one["error"] is None else f": {one['error']:.2g}, {one['allowed']:.2g} allowed"
        shown.append(f"{one['status']}: {one['name']}{off} {one['reason']}".rstrip())
    right = sum(one["status"] == "right" for one in checked)
    shown.append(f"{right} of {len(checked)} checks right")
    for kernel, state in found.items():
        said = {"right": "right where it ran", "failed": "wrong", "unfinished": "not all run"}
        shown.append(f"  {kernel:<24} {said[state] if dry_run else state}")
    if dry_run:
        shown.append("DRY RUN in Triton's interpreter: this proves nothing and writes no record.")
    return shown
