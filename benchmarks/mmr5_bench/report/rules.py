"""What a comparison fails on: ``--fail p95:10%`` and ``--fail recall@1:-0.02`` as rules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Latency = Literal["p50", "p90", "p95", "p99", "mean"]
LATENCIES: tuple[Latency, ...] = get_args(Latency)
# Shares of lists on which more is worse; of every other metric more is better.
LESS_IS_BETTER = ("repaired", "fallback", "error")
_QUALITY = re.compile(
    r"(macro_)?recall@\d+|ndcg@\d+|mrr|kendall_tau|(top1|order)_agreement|ok|repaired|fallback|error"
)
_PERCENT = re.compile(r"\+?(\d+(?:\.\d+)?)\s?%")
_CHANGE = re.compile(r"([+-])(\d*\.?\d+)")
EXAMPLES = "--fail p95:10%, --fail recall@1:-0.02 or --fail fallback:+0.01"


@dataclass(frozen=True)
class LatencyRule:
    """``statistic`` may become longer by the share ``allowed`` (0.1 for 10 %), and no more."""

    statistic: Latency
    allowed: float

    @property
    def text(self) -> str:
        """As it is written on the command line."""
        return f"{self.statistic}:{100 * self.allowed:g}%"


@dataclass(frozen=True)
class QualityRule:
    """``metric`` may become worse by ``allowed``, in its own unit, and no more."""

    metric: str
    allowed: float

    @property
    def text(self) -> str:
        """As it is written on the command line."""
        return f"{self.metric}:{'+' if self.metric in LESS_IS_BETTER else '-'}{self.allowed:g}"


Rule = LatencyRule | QualityRule


def parse_rule(text: str) -> Rule:
    """One ``--fail``; ValueError with an example for anything that is no rule."""
    name, colon, amount = text.strip().partition(":")
    if not colon or not amount:
        raise ValueError(f"{text!r} is no rule; write for example {EXAMPLES}")
    if name in LATENCIES:
        percent = _PERCENT.fullmatch(amount.strip())
        if not percent:
            raise ValueError(
                f"{text!r}: a latency may grow by so many percent, for example {name}:10%"
            )
        return LatencyRule(name, float(percent[1]) / 100)
    if not _QUALITY.fullmatch(name):
        raise ValueError(
            f"{text!r}: no metric is called {name!r}; latencies are {', '.join(LATENCIES)}, and "
            f"qualities for example recall@1, ndcg@5 or fallback. Write {EXAMPLES}"
        )
    change = _CHANGE.fullmatch(amount.strip())
    worse = "+" if name in LESS_IS_BETTER else "-"
    if not change or change[1] != worse:
        raise ValueError(
            f"{text!r}: {name} becomes worse with a {'rise' if worse == '+' else 'drop'}; write "
            f"how much of one is allowed, for example {name}:{worse}0.02"
        )
    return QualityRule(name, float(change[2]))
