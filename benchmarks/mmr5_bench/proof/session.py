"""Runs the checks one after the other, with inputs drawn anew and poisoned memory."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from mmr5_bench.proof.case import TINY, TRUE, Case, Scale
from mmr5_bench.proof.linear_cases import linear_cases
from mmr5_bench.proof.prompt_cases import prompt_cases
from mmr5_bench.proof.record import Checked
from mmr5_bench.proof.step_cases import step_cases


def every_case(device: torch.device, *, dry_run: bool) -> list[Case]:
    """All checks, those of a decode step first."""
    scale: Scale = TINY if dry_run else TRUE
    return [
        *step_cases(scale, device),
        *linear_cases(scale, device),
        *prompt_cases(scale, device),
    ]


def run_cases(
    cases: Sequence[Case],
    *,
    seconds: float,
    seed: int,
    draws: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Checked]:
    """Every check ``draws`` times, each with other random inputs; ends early when time is over.

    A check that raises is wrong as well. Memory that a kernel forgets to write holds NaN.
    """
    ends = time.monotonic() + seconds
    found: list[Checked] = []
    with poisoned_memory():
        for number, case in enumerate(cases):
            left = ends - time.monotonic()
            found.append(_check(case, seed + number, draws) if left > 0 else _not_run(case))
            progress(number + 1, len(cases))
    return found


def _check(case: Case, seed: int, draws: int) -> Checked:
    result: Checked = {
        "name": case.name,
        "kernels": list(case.kernels),
        "status": "right",
        "error": 0.0,
        "allowed": None,
        "reason": "",
    }
    for draw in range(draws):
        torch.manual_seed(1000 * draw + seed)
        try:
            finding = case.check()
        except Exception as error:  # whatever a kernel raises says that it is not right
            line = next(iter(str(error).splitlines()), "")
            return {
                **result,
                "status": "error",
                "error": None,
                "reason": f"{type(error).__name__}: {line}",
            }
        finite = math.isfinite(finding.error)
        if not finding.is_right or finding.error >= (result["error"] or 0.0):
            result["error"] = finding.error if finite else None
            result["allowed"] = finding.allowed
        if not finding.is_right:
            return {
                **result,
                "status": "wrong",
                "reason": "" if finite else "not finite or unequal",
            }
    return result


def _not_run(case: Case) -> Checked:
    return {
        "name": case.name,
        "kernels": list(case.kernels),
        "status": "not run",
        "error": None,
        "allowed": None,
        "reason": "the time of the whole run was over",
    }


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN (integers their largest number) until they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_before = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of references that have no deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
