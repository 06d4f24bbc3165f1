"""AdamW with warm-up, cosine decay and gradient clipping: one training step for every stage."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Schedule:
    """Optimiser of one stage; the rate rises over 5 % of the steps and decays to 5 % of it."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, rate: float, steps: int) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        decayed = [p for p in self._parameters if p.dim() > 1]
        plain = [p for p in self._parameters if p.dim() <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}],
            lr=rate,
            betas=(0.9, 0.98),
        )
        warmup = max(1, steps // 20)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = (step - warmup) / max(1, steps - warmup)
            return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        self._rates = torch.optim.lr_scheduler.LambdaLR(self._optimizer, factor)

    def step(self, loss: Tensor) -> None:
        """Back-propagate ``loss``, clip the gradient norm to 1 and update."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._rates.step()
