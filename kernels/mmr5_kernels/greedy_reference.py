"""The greedy choice of the next token in plain torch: what ``ops.greedy`` has to equal."""

from __future__ import annotations

import torch
from torch import Tensor

NO_TOKEN = -1  # the choice of a row that holds a NaN


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty: logits [..., V] float32 of the tokens in ``seen`` [..., V] bool.

    A positive logit is divided by ``penalty``, a negative one multiplied, as in ``transformers``.
    """
    # As a tensor: by a plain number, torch divides on the CPU, but on a GPU multiplies with the
    # reciprocal, which may be another number in the last bit.
    divisor = torch.full((), penalty, dtype=logits.dtype, device=logits.device)
    changed = torch.where(logits < 0, logits * divisor, logits / divisor)
    return torch.where(seen, changed, logits)


def greedy_tokens(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """The likeliest token of each row, after the repetition penalty.

    logits [R, V] float32; ``seen`` [R, V] bool, the tokens the penalty applies to, or None for no
    penalty. Returns [R] int64: of equal logits the lowest id, and :data:`NO_TOKEN` where a row
    holds a NaN.
    """
    if seen is not None:
        logits = penalised(logits, seen, penalty)
    return logits.argmax(-1).masked_fill_(logits.isnan().any(-1), NO_TOKEN)
