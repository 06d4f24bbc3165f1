"""Where one sequence stands: its KV arena and the rotary position that comes next.

Everything that continues a sequence goes through a cursor, so that a fork is only a mark to which
it is rewound: a probe, a rejected draft, another sample of the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmr5_runtime.engine import Engine
from mmr5_runtime.model import MAX_DECODE_TOKENS, decode_step, embed_prompt, read_tokens
from mmr5_runtime.rope import Grid, mrope_positions


class Mark(NamedTuple):
    """A place to come back to: tokens in the arena, and the next rotary position."""

    length: int
    position: int


class Cursor:
    """One sequence in an arena of its own."""

    def __init__(self, engine: Engine, capacity: int) -> None:
        self._model = engine.model
        self.arena = engine.model.new_arena(capacity)
        self.position = 0
        self.steps = 0  # forward passes made by `step`

    @property
    def mark(self) -> Mark:
        return Mark(self.arena.length, self.position)

    def rewind(self, mark: Mark) -> None:
        """Forget what was read after ``mark``."""
        self.arena.truncate(mark.length)
        self.position = mark.position

    def forget(self, tokens: int) -> None:
        """Forget the last ``tokens``, all of them text."""
        self.rewind(Mark(self.arena.length - tokens, self.position - tokens))

    @torch.inference_mode()
    def read(
        self,
        token_ids: Sequence[int],
        embeddings: Sequence[Tensor] = (),
        grids: Sequence[Grid] = (),
    ) -> Tensor:
        """Read one segment of a prompt; returns its hidden states [T, hidden]."""
        ids = torch.tensor(token_ids, dtype=torch.long)
        positions, position = mrope_positions(ids, grids, self._model.spec, self.position)
        embeds = embed_prompt(self._model, ids, embeddings)
        hidden = read_tokens(self._model, embeds, positions, self.arena)
        self.position = position
        return hidden

    def read_head(self, token_ids: Sequence[int], twin: Cursor | None) -> None:
        """Read text into an empty cursor, or copy it from the start of a ``twin`` that did."""
        if twin is None:
            self.read(token_ids)
        else:
            self.load(*twin.arena.view(0, len(token_ids)), token_ids, ())

    @torch.inference_mode()
    def load(self, k: Tensor, v: Tensor, token_ids: Sequence[int], grids: Sequence[Grid]) -> None:
        """Take over the keys and values of a segment instead of reading it."""
        _, position = mrope_positions(token_ids, grids, self._model.spec, self.position)
        self.arena.load(k, v)
        self.position = position

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [V] after the last of the hidden states [T, hidden]."""
        out: Tensor = self._model.decoder.logits(hidden[-1:])[0]
        return out

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Read T >= 1 tokens of text; fp32 logits [T, V] after each. One pass for up to 8."""
        rows = []
        for start in range(0, len(token_ids), MAX_DECODE_TOKENS):
            part = list(token_ids[start : start + MAX_DECODE_TOKENS])
            positions = torch.arange(self.position, self.position + len(part))
            rows.append(
                decode_step(self._model, torch.tensor([part]), positions[None], [self.arena])[0]
            )
            self.position += len(part)
            self.steps += 1
        return rows[0] if len(rows) == 1 else torch.cat(rows)
