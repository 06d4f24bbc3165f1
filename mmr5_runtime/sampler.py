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


@dataclass(frozen=True, eq=False)
class Choice:
    """A token as the device chose it; the host has read nothing of it yet.

    ``token`` [1] int64 is a valid id even where the logits were not numbers, so that a forward pass
    may follow before anyone looks. ``logit`` [1] float32 is what was chosen freely: a NaN or an
    infinity is preferred to any number, so that one tells of all. ``changed`` [1] bool says whether
    `allowed` changed the choice, None without it. ``undo`` is for :meth:`Sampler.settle`.
    """

    token: Tensor
    logit: Tensor
    changed: Tensor | None = None
    undo: Tensor | None = None


class Sampler:
    """State of one sequence: the tokens seen so far and a generator of its own.

    A choice takes two calls, so that the device can go on between them: :meth:`choose` queues it
    and :meth:`settle` takes note of what came out. :meth:`pick` is both, and waits.
    """

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
        """:meth:`choose` and :meth:`settle`: the next token for ``logits`` [V] float32."""
        choice = self.choose(logits, allowed)
        self.settle(choice, choice.changed is not None and bool(choice.changed))
        return int(choice.token)

    def choose(self, logits: Tensor, allowed: Tensor | None = None) -> Choice:
        """The next token for ``logits`` [V] float32, which counts as seen from then on.

        ``allowed`` [n] int64 limits the choice. The free choice is made first and kept where it is
        allowed, so that a sequence which never leaves the allowed tokens is the one that would have
        come without them; otherwise the choice is made among the allowed alone. Both together are
        the distribution limited to the allowed tokens, but for top-k and top-p, which each choice
        applies anew. :meth:`settle` the choice before the next one.
        """
        params = self._params
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._seen, penalised, logits)
        token, changed, undo = self._draw(logits), None, None
        logit = logits.gather(0, token)
        if allowed is not None:
            if params.temperature != 0.0:
                undo = self._generator.get_state()  # kept by the host, on every device
            changed = (allowed != token).all(0, keepdim=True)
            # The second choice is made in any case: to know whether it is needed is to wait.
            place = self._draw(logits.index_select(0, allowed))
            token = torch.where(changed, allowed.index_select(0, place), token)
        self._seen.index_fill_(0, token, True)
        return Choice(token, logit, changed, undo)

    def settle(self, choice: Choice, changed: bool) -> None:
        """Take note of the last choice, now that the host knows whether it was ``changed``."""
        self.interventions += changed
        if choice.undo is not None and not changed:
            self._generator.set_state(choice.undo)  # as if the second choice had not been drawn

    def observe(self, token: int) -> None:
        """A token that was not picked here, but written all the same: it counts as seen."""
        self._seen[token] = True

    def _draw(self, logits: Tensor) -> Tensor:
        """Place [1] int64 of a choice among ``logits``."""
        if self._params.temperature == 0.0:
            return logits.argmax(0, keepdim=True)
        return self._sample(logits / self._params.temperature)

    def _sample(self, logits: Tensor) -> Tensor:
        best, ids = logits.topk(min(self._params.top_k or len(logits), len(logits)))
        probabilities = best.softmax(-1)
        if self._params.top_p < 1.0:  # keep the smallest head whose mass reaches top_p
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self._params.top_p, 0.0)
        # What torch.multinomial does for one draw, without its look at the probabilities, which
        # waits on a GPU or, for a NaN, ends the process' use of it.
        noise = torch.empty_like(probabilities).exponential_(1.0, generator=self._generator)
        return ids[(probabilities / noise).argmax(0, keepdim=True)]
