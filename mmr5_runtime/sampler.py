"""The next token from the logits: greedy, or sampled as the reference samples.

The order of the steps is that of ``transformers``' ``generate``: repetition penalty, temperature,
top-k, top-p. Greedy decoding keeps the repetition penalty of the checkpoint's
``generation_config.json``, because the reference applies it as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmr5_runtime.types import RequestError

DEFAULT_TOP_K = 50  # what `generate` uses when generation_config.json is silent


@dataclass(frozen=True)
class SamplingParams:
    """How one request picks its tokens; ``temperature`` 0 is greedy, ``top_k`` 0 keeps all tokens.

    ``seed`` makes sampling repeatable on one device; without it torch draws one.
    """

    temperature: float = 0.0
    top_k: int = DEFAULT_TOP_K
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0.0 and not 1e-3 <= self.temperature <= 10.0:
            raise RequestError(
                f"temperature={self.temperature} is neither 0 nor in 0.001..10; "
                "use 0 for greedy or 0.3 for the reference's sampling."
            )
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 1 << 64):
            raise RequestError(
                f"seed={self.seed!r} is not a whole number from 0 to 2**64 - 1; pass one or None."
            )

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any], *, temperature: float, seed: int | None
    ) -> SamplingParams:
        """The checkpoint's own top-k, top-p and repetition penalty with a caller's temperature."""
        given = {key: value for key, value in config.items() if value is not None}
        return cls(
            temperature=temperature,
            top_k=int(given.get("top_k", DEFAULT_TOP_K)),
            top_p=float(given.get("top_p", 1.0)),
            repetition_penalty=float(given.get("repetition_penalty", 1.0)),
            seed=seed,
        )


class Sampler:
    """State of one sequence: the tokens seen so far and a generator of its own."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._params = params
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._seen[torch.as_tensor(prompt_ids, dtype=torch.long, device=device)] = True
        self.interventions = 0  # choices that `allowed` changed
        self._generator = torch.Generator(device=device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def pick(self, logits: Tensor, allowed: Tensor | None = None) -> int:
        """The next token for ``logits`` [V] float32; the token counts as seen from then on.

        ``allowed`` [n] int64 limits the choice. The free choice is made first and kept where it is
        allowed, so that a sequence which never leaves the allowed tokens is the one that would have
        come without them; otherwise ``interventions`` counts one and the choice is made among the
        allowed alone. Both together are the distribution limited to the allowed tokens, but for
        top-k and top-p, which each choice applies anew.
        """
        params = self._params
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._seen, penalised, logits)
        token = self._choose(logits)
        if allowed is not None and not bool((allowed == token).any()):
            self.interventions += 1
            token = int(allowed[self._choose(logits[allowed])])
        self._seen[token] = True
        return token

    def observe(self, token: int) -> None:
        """A token that was not picked here, but written all the same: it counts as seen."""
        self._seen[token] = True

    def _choose(self, logits: Tensor) -> int:
        if self._params.temperature == 0.0:
            return int(logits.argmax())
        return self._sample(logits / self._params.temperature)

    def _sample(self, logits: Tensor) -> int:
        best, ids = logits.topk(min(self._params.top_k or len(logits), len(logits)))
        probabilities = best.softmax(-1)
        if self._params.top_p < 1.0:  # keep the smallest head whose mass reaches top_p
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self._params.top_p, 0.0)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        return int(ids[drawn])
