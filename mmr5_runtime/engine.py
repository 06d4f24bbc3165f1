"""Vision, prefill and the decode loop over one model; knows nothing of prompts or pages.

Data flow of one generation: page embeddings and token ids are merged into one row of embeddings,
prefilled into a KV arena of exactly the needed capacity, and decoded token by token until an
end-of-sequence token or the token budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import Model, decode_step, embed_prompt, prefill
from mmr5_runtime.rope import Grid, mrope_positions
from mmr5_runtime.sampler import Sampler
from mmr5_runtime.timing import Timings
from mmr5_runtime.types import StopReason


class Engine:
    """Runs one model on one device; holds no state between generations."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model = model
        self.spec = model.spec
        self.device = device

    @torch.inference_mode()
    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        """Page embeddings [P / merge^2, hidden] of patches [P, patch_dim] float32."""
        embeddings: Tensor = self.model.visual(pixel_values.to(self.device), grid)
        return embeddings


class Generation:
    """One sequence being decoded; iterating yields new token ids, the end token excluded."""

    def __init__(
        self,
        engine: Engine,
        token_ids: Sequence[int],
        page_embeddings: Sequence[Tensor],
        grids: Sequence[Grid],
        sampler: Sampler,
        max_new_tokens: int,
        timings: Timings,
    ) -> None:
        self._engine = engine
        self._token_ids = torch.tensor(token_ids, dtype=torch.long, device=engine.device)
        self._page_embeddings = page_embeddings
        self._grids = grids
        self._sampler = sampler
        self._max_new_tokens = max_new_tokens
        self._timings = timings
        self.stop_reason: StopReason = "max_tokens"
        self.num_tokens = 0  # decoded so far, the end token included

    def __iter__(self) -> Iterator[int]:
        end = self._engine.spec.eos_token_ids
        with self._timings.span("prefill"):
            logits, arena, position = self._prefill()
        while True:
            with self._timings.span("decode"):
                token = self._sampler.pick(logits)
            self.num_tokens += 1
            if token in end:
                self.stop_reason = "eos"
                return
            yield token
            if self.num_tokens >= self._max_new_tokens:
                return
            with self._timings.span("decode"):
                logits = self._step(token, position, arena)
            position += 1

    @torch.inference_mode()
    def _prefill(self) -> tuple[Tensor, KVArena, int]:
        """Logits [V] after the prompt, its filled arena, and the next rotary position."""
        model = self._engine.model
        capacity = len(self._token_ids) + self._max_new_tokens
        arena = model.new_arena(capacity)
        positions, position = mrope_positions(self._token_ids.cpu(), self._grids, self._engine.spec)
        embeds = embed_prompt(model, self._token_ids, self._page_embeddings)
        logits = prefill(model, embeds, positions, arena)
        return logits, arena, position

    @torch.inference_mode()
    def _step(self, token: int, position: int, arena: KVArena) -> Tensor:
        ids = torch.tensor([[token]], device=self._engine.device)
        positions = torch.tensor([[position]], device=self._engine.device)
        return decode_step(self._engine.model, ids, positions, [arena])[0, 0]
