"""Where one sequence stands: its KV arena and the rotary position that comes next.

Everything that continues a sequence goes through a cursor, so that a fork is only a mark to which
it is rewound: a probe, a rejected draft, a step that was launched ahead, another sample of the same
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mmr5_runtime.batching import Seat
from mmr5_runtime.engine import Engine
from mmr5_runtime.model import MAX_DECODE_TOKENS, embed_prompt, read_tokens
from mmr5_runtime.rope import Grid, mrope_positions
from mmr5_runtime.types import EngineError


class Mark(NamedTuple):
    """A place to come back to: tokens in the arena, and the next rotary position."""

    length: int
    position: int


class Cursor:
    """One sequence in an arena of its own."""

    asynchronous = False  # whether a step is only queued by the time its call returns
    _seat: Seat | None = None

    def __init__(self, engine: Engine, capacity: int, seat: Seat | None = None) -> None:
        """``seat`` takes the steps where several sequences decode together."""
        self._engine = engine
        self._model = engine.model
        self._seat = seat
        self.arena = engine.model.new_arena(capacity)
        self.position = 0
        self.steps = 0  # forward passes made by `step`, but for those taken back
        self._last_read = 0  # token
        if engine.device.type == "cuda":
            self.asynchronous = True

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

    def follow(self, position: int, token: int) -> None:
        """Stand behind what others read into the arena: the next position and the last token."""
        self.position, self._last_read = position, token

    def take_back(self) -> None:
        """Forget the last step, of one token, as if it had never been made."""
        self.forget(1)
        self.steps -= 1

    def together(self) -> AbstractContextManager[object]:
        """While decoding: steps wait for those of the other sequences that decode."""
        return nullcontext() if self._seat is None else self._seat.joined()

    def not_finite(self, token: int | None) -> EngineError:
        """The error for logits that are no numbers; ``token`` was read last, None in the prompt."""
        last = self._last_read if token is None else token
        with nullcontext() if self._seat is None else self._seat.turn():
            return self._engine.not_finite(last, self.position - 1, self.arena)

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
        self._last_read = token_ids[-1]
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
        return self._model.logits(hidden[-1:])[0]

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Read T >= 1 tokens of text; fp32 logits [T, V] after each. One pass for up to 8.

        A tensor [T] int64 may lie on the device: the host need not know tokens chosen there. On a
        GPU nothing waits for the device.
        """
        forward = self._engine.step if self._seat is None else self._seat.step
        rows = []
        for start in range(0, len(token_ids), MAX_DECODE_TOKENS):
            part = torch.as_tensor(token_ids[start : start + MAX_DECODE_TOKENS])
            positions = torch.arange(self.position, self.position + len(part))
            rows.append(forward(part[None], positions[None], [self.arena])[0])
            self.position += len(part)
            self.steps += 1
        return rows[0] if len(rows) == 1 else torch.cat(rows)
