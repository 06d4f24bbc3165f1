"""Whether two contenders computed the same thing, by their logits.

Centred cosine per row: what all tokens have in common, as the logits of a trained model do, is no
agreement. 16-bit arithmetic and 8-bit activations leave 0.999 and more. With random weights another
prefix or last token leaves 0.6 and less, one other token of a prompt 0.92 to 0.997. Mini answers
random tokens much alike whatever stood before (0.92 to 0.998 without the prefix), so that what
tells contenders apart there is that all of them run the random shapes with the same code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmr5_bench.backends.shapes import Case
from mmr5_bench.peers.base import WorkMismatchError

LEAST = 0.995


@dataclass(frozen=True)
class Agreement:
    """``cosine`` of the row that agrees least; ``greedy`` is whether all rows have the same best
    token."""

    cosine: float
    greedy: bool


def agreement(logits: Tensor, reference: Tensor) -> Agreement:
    """Of logits [T, V] with those of the reference [T, V].

    WorkMismatchError for other shapes and for numbers that are not finite.
    """
    if logits.shape != reference.shape:
        raise WorkMismatchError(
            f"gave logits {list(logits.shape)} where the reference has {list(reference.shape)}; "
            "ask every contender for the same tokens."
        )
    if not torch.isfinite(logits).all():
        raise WorkMismatchError("gave logits that are not finite; compare its layers one by one.")
    mine, theirs = (
        rows.double() - rows.double().mean(-1, keepdim=True) for rows in (logits, reference)
    )
    cosine = torch.nn.functional.cosine_similarity(mine, theirs, dim=-1)
    same = torch.equal(logits.argmax(-1), reference.argmax(-1))
    return Agreement(float(cosine.min()), same)


def require(found: Agreement, subject: str, case: Case) -> None:
    """WorkMismatchError unless the logits are of the same work."""
    if found.cosine < LEAST:
        raise WorkMismatchError(
            f"{subject}, {case.label}: logits have a cosine of {found.cosine:.3f} with the "
            f"reference's, less than {LEAST}; it did other work, so that no time of it counts."
        )
