"""How far a quantized model is from its original: pure functions of logits and of rankings.

Nothing here runs a model. Sums are kept per sample, so that an interval over samples can be drawn
later and two quantizations can be compared pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mmr5_runtime.agreement import kendall_tau, recall_at, top1
from mmr5_runtime.types import ExportError, Status

KS = (1, 3, 5)
ORIGINAL = "bf16"
_BLOCK_ELEMENTS = 1 << 22  # float64 copies of both sides are made for this many logits at a time


class VerificationFailed(ExportError):
    """The engine was written, but is worse than what was asked for, or gives no usable output."""


@dataclass(frozen=True)
class TokenSums:
    """Sums over the predicted tokens of one sample, or of several added up; nll and kl in nats."""

    tokens: int = 0
    kl: float = 0.0
    reference_nll: float = 0.0
    nll: float = 0.0
    agreeing: int = 0

    def __add__(self, other: TokenSums) -> TokenSums:
        return TokenSums(
            self.tokens + other.tokens,
            self.kl + other.kl,
            self.reference_nll + other.reference_nll,
            self.nll + other.nll,
            self.agreeing + other.agreeing,
        )


@torch.no_grad()
def compare(
    reference_logits: Tensor, logits: Tensor, targets: Tensor, name: str = "the sample"
) -> TokenSums:
    """Compares two models on the same R predictions, in float64 and a few rows at a time.

    ``reference_logits`` and ``logits`` [R, V], any float dtype and device (the second is brought to
    the device of the first); ``targets`` [R] int64, the token that came next. KL is
    KL(reference || other); agreement means that both rank the same token first.

    Raises ``ValueError`` for shapes that do not agree or no rows, :class:`VerificationFailed`
    naming the sample for logits that are not finite.
    """
    rows, vocabulary = reference_logits.shape
    if not rows or logits.shape != reference_logits.shape or tuple(targets.shape) != (rows,):
        raise ValueError(
            f"logits {list(reference_logits.shape)} and {list(logits.shape)} with targets "
            f"{list(targets.shape)} cannot be compared; give [R, V] twice and [R] with R at least 1"
        )
    if not bool(torch.isfinite(reference_logits).all() and torch.isfinite(logits).all()):
        raise VerificationFailed(
            f"the logits on {name} are not finite; export with --quant int8-weight-only or bf16, "
            "and check the checkpoint."
        )
    targets = targets.to(reference_logits.device)
    block = max(1, _BLOCK_ELEMENTS // vocabulary)
    total = TokenSums()
    for start in range(0, rows, block):
        cut = slice(start, start + block)
        p = reference_logits[cut].double().log_softmax(-1)
        q = logits[cut].to(p.device).double().log_softmax(-1)
        # Rounding can leave a divergence of equal rows a hair below zero.
        kl = (p.exp() * (p - q)).sum(-1).clamp_min(0.0)
        at = targets[cut, None]
        total += TokenSums(
            tokens=len(p),
            kl=float(kl.sum()),
            reference_nll=float(-p.gather(1, at).sum()),
            nll=float(-q.gather(1, at).sum()),
            agreeing=int((p.argmax(-1) == q.argmax(-1)).sum()),
        )
    return total


@dataclass(frozen=True)
class TokenMetrics:
    """Means over all predicted tokens of ``samples``; every sample keeps its own sums."""

    samples: tuple[TokenSums, ...]

    def __post_init__(self) -> None:
        if not self.total.tokens:
            raise ValueError("token metrics need at least one predicted token")

    @property
    def total(self) -> TokenSums:
        return sum(self.samples, TokenSums())

    @property
    def kl(self) -> float:
        """Mean KL(reference || engine) per token in nats."""
        return self.total.kl / self.total.tokens

    @property
    def perplexity(self) -> float:
        """exp of the engine's mean nll; inf where float64 ends."""
        return _exp(self.total.nll / self.total.tokens)

    @property
    def reference_perplexity(self) -> float:
        """exp of the reference's mean nll; inf where float64 ends."""
        return _exp(self.total.reference_nll / self.total.tokens)

    @property
    def agreement(self) -> float:
        """Share of positions at which both models would say the same token next."""
        return self.total.agreeing / self.total.tokens

    def to_json(self) -> dict[str, Any]:
        """Means, and the sums of every sample under ``samples``; an infinite perplexity is None."""
        return {
            "tokens": self.total.tokens,
            "kl_nats": self.kl,
            "perplexity": _finite(self.perplexity),
            "reference_perplexity": _finite(self.reference_perplexity),
            "next_token_agreement": self.agreement,
            "samples": [asdict(sample) for sample in self.samples],
        }


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Ranking:
    """``order``: 0-based pages, best first; ``status``: how it was read from the answer."""

    order: tuple[int, ...]
    status: Status


@dataclass(frozen=True)
class RankedSample:
    """Both rankings of one list; ``relevant`` holds its 0-based labelled pages, None if unknown.

    ``reference_by`` is the format of the model that gave the reference: "bf16" is the original,
    anything else a copy of it.
    """

    reference: Ranking
    engine: Ranking
    relevant: tuple[int, ...] | None = None
    reference_by: str = ORIGINAL

    def __post_init__(self) -> None:
        if not self.engine.order or sorted(self.engine.order) != sorted(self.reference.order):
            raise ValueError(
                f"orders {self.reference.order} and {self.engine.order} are not of the same pages"
            )


def reference_name(reference_by: str) -> str:
    """What to call the model that gave the reference rankings."""
    if reference_by == ORIGINAL:
        return "the original"
    return f"a copy of the original stored as {reference_by}"


@dataclass(frozen=True)
class RankMetrics:
    """Shares over ``samples``, which are kept."""

    samples: tuple[RankedSample, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("rank metrics need at least one list")

    @property
    def reference_by(self) -> str:
        """Who gave the reference rankings: "bf16", or the format of a copy that gave any of them.

        See :func:`reference_name`.
        """
        others = {sample.reference_by for sample in self.samples} - {ORIGINAL}
        return " and ".join(sorted(others)) or ORIGINAL

    @property
    def first_choice_agreement(self) -> float:
        """Share of lists whose first page is the reference's."""
        return self._mean([top1(s.engine.order, s.reference.order) for s in self.samples])

    @property
    def order_agreement(self) -> float:
        """Share of lists ordered exactly as by the reference."""
        return self._mean([s.engine.order == s.reference.order for s in self.samples])

    @property
    def tau(self) -> float:
        """Mean Kendall tau between the two orders."""
        return self._mean([kendall_tau(s.reference.order, s.engine.order) for s in self.samples])

    @property
    def well_formed(self) -> tuple[float, float]:
        """Share of answers that named every page exactly once: reference, engine."""
        return (
            self._mean([s.reference.status == "ok" for s in self.samples]),
            self._mean([s.engine.status == "ok" for s in self.samples]),
        )

    def recall(self, k: int) -> tuple[float, float] | None:
        """Mean Recall@k of reference and engine over the labelled lists; None without any."""
        pairs = [
            (recall_at(s.reference.order, s.relevant, k), recall_at(s.engine.order, s.relevant, k))
            for s in self.samples
            if s.relevant
        ]
        if not pairs:
            return None
        reference, engine = zip(*pairs, strict=True)
        return self._mean(reference), self._mean(engine)

    def to_json(self) -> dict[str, Any]:
        """Shares, and both orders of every list under ``samples``."""
        well_formed = dict(zip(("reference", "engine"), self.well_formed, strict=True))
        recalls = {k: self.recall(k) for k in KS}
        return {
            "lists": len(self.samples),
            "reference_by": self.reference_by,
            "labelled_lists": sum(bool(s.relevant) for s in self.samples),
            "first_choice_agreement": self.first_choice_agreement,
            "order_agreement": self.order_agreement,
            "kendall_tau": self.tau,
            "well_formed": well_formed,
            "recall": {
                str(k): {"reference": pair[0], "engine": pair[1]}
                for k, pair in recalls.items()
                if pair is not None
            },
            "samples": [asdict(sample) for sample in self.samples],
        }

    @staticmethod
    def _mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)
