"""What the GPU engine is meant to reach, as data, and whether a measured value does.

The stated floors are those of the plan (4.3 TB/s and 790 TFLOP/s in bf16); the floor that a result
is held against is computed from the ceilings measured in the same run (:mod:`work`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["ms", "us", "s", "GB", "x", "of copy"]


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    ``target`` is to be met, ``stretch`` is what is hoped for. ``more`` says that larger is better.
    ``stated_floor`` is that of the plan, in the same unit, or None where there is none.
    """

    key: str
    what: str
    unit: Unit
    target: float
    stated_floor: float | None = None
    stretch: float | None = None
    more: bool = False

    def met_by(self, value: float) -> bool:
        """Whether ``value`` reaches the target."""
        return value >= self.target if self.more else value <= self.target

    def better(self, a: float, b: float) -> bool:
        """Whether ``a`` is better than ``b``."""
        return a > b if self.more else a < b

    @property
    def sign(self) -> str:
        """How the target is written: at most, or at least."""
        return "≥" if self.more else "≤"


GOALS: tuple[Goal, ...] = (
    Goal("decode-step", "decode step, int4 g128 + int8 head, 8k context", "ms", 1.35, 0.99, 1.2),
    Goal("gate-up", "gate-up GEMM, M = 1 (floor 16.3 us)", "of copy", 0.75, more=True),
    Goal("down", "down GEMM, M = 1 (floor 8.1 us)", "of copy", 0.75, more=True),
    Goal("attention-4k", "decode attention, 4k", "us", 7.0, 1.9),
    Goal("attention-16k", "decode attention, 16k", "us", 14.0, 7.8),
    Goal("prefill-13k", "prefill, 13k tokens (8-bit)", "ms", 220.0, 154.0),
    Goal("vision-20", "vision, 20 pages x 616 tokens, bf16", "ms", 110.0, 70.0),
    Goal("rerank-cold", "whole rerank, 20 x 616, 110 tokens, cold", "s", 0.50, 0.33),
    Goal("rerank-seen", "whole rerank, 20 x 616, 110 tokens, pages seen", "s", 0.40, 0.26),
    Goal("against-transformers", "the same against transformers, same run", "x", 8.0, more=True),
    Goal("memory", "GPU memory, 10 x 1,280 tokens, int4", "GB", 12.0),
    Goal("first-rerank", "load to the end of the first rerank, int4", "s", 15.0),
    Goal("import", "import mmr5_runtime", "s", 2.0),
)


def goal(key: str) -> Goal:
    """The goal of this key; KeyError for none."""
    return next(one for one in GOALS if one.key == key)
