"""One model on one device; knows nothing of prompts, pages or requests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mmr5_runtime.backbone import Backbone
from mmr5_runtime.compute import Compute
from mmr5_runtime.exhaustion import memory_errors, page_shortage
from mmr5_runtime.finite import not_finite
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import Model, decode_shape, decode_step
from mmr5_runtime.rope import Grid
from mmr5_runtime.step.buckets import TOKENS, Bucket, spans
from mmr5_runtime.step.stepper import Stepper, make_stepper
from mmr5_runtime.types import EngineError

USUAL_LENGTH = 16384
"""Tokens up to which :meth:`Engine.warm_up` records steps: ten pages and an answer, or more."""
_SHORT = 2048  # prompts below are rare, and steps over them cheap enough to be recorded on demand


class Engine:
    """Runs one model on one device; holds no state between generations.

    Decode steps run on one thread and one stream at a time: recorded ones share their memory.
    """

    def __init__(
        self, model: Backbone, device: torch.device, compute: Compute | None = None
    ) -> None:
        """``compute`` is what the model was built for; plain torch unless given.

        Raises :class:`EngineError` when the kernels of a fused step do not serve this model.
        """
        self.model = model
        self.spec = model.spec
        self.device = device
        self.compute = compute or Compute.plain(device, model.dtype)
        self._stepper: Stepper | None = None
        if self.compute.fused_steps and isinstance(model, Model):
            self._stepper = make_stepper(model, self.compute)
        # Whether a row of a step has the same bits in any company: of a draft, of other sequences.
        self.independent_rows = self._stepper is not None and self._stepper.independent
        # The same of a whole sequence, whatever the company of its rows inside it.
        self.independent_sequences = self.independent_rows or model.independent_sequences

    @torch.inference_mode()
    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        """Page embeddings [P / merge^2, hidden] of patches [P, patch_dim] float32.

        Raises :class:`OutOfMemoryError` naming the pixels that would fit.
        """
        shortage = partial(
            page_shortage, self.spec.vision, self.model.dtype, len(pixel_values), self.device
        )
        with memory_errors(self.device, shortage), self.model.here():
            return self.model.encode_page(pixel_values, grid)

    @torch.inference_mode()
    def step(self, token_ids: Tensor, positions: Tensor, arenas: Sequence[KVArena]) -> Tensor:
        """Adds T tokens to each of B sequences of any lengths; 1 <= B <= 8, 1 <= T <= 8.

        token_ids, positions [B, T] int64, on the host or on the device: ids that were just chosen
        there need not be known to the host. A position is that of a text token, the same on all
        three axes. ``arenas``: a different one per sequence. Returns logits [B, T, V] fp32, which
        belong to the caller: no later step writes to them. On a GPU nothing waits for the device.

        Raises :class:`RequestError` on other sizes and for ids or positions that the model does not
        have, :class:`ContextOverflowError` when one arena is full; no arena is changed then.
        """
        if self._stepper is None:
            with self.model.here():
                return decode_step(self.model, token_ids, positions, arenas)
        _, tokens = decode_shape(token_ids, positions, arenas)
        for arena in arenas:
            arena.require(tokens)
        with self.model.here():
            logits = self._stepper.step(token_ids, positions, arenas)
        for arena in arenas:
            arena.advance(tokens)
        return logits

    @torch.inference_mode()
    def warm_up(self, sequences: Sequence[int] = (1,), longest: int = USUAL_LENGTH) -> int:
        """Compiles and records the steps of usual sizes before the first request asks for them.

        For every number of ``sequences`` and tokens, and lengths up to ``longest``. Returns how
        many sizes are recorded; 0 where steps run in plain torch.
        """
        if self._stepper is None:
            return 0
        chunk = self._stepper.chunk
        usual = spans(min(longest, self.spec.text.max_position_embeddings), chunk)
        usual = [span for span in usual if span > _SHORT] or usual[-1:]
        buckets = [Bucket(b, t, span) for b in sequences for t in TOKENS for span in usual]
        with self.model.here():
            self._stepper.record(buckets)
        return len(self._stepper.recordings)

    def not_finite(self, token_id: int, position: int, arena: KVArena) -> EngineError:
        """The error to raise when logits hold NaN or infinity; names the part they come from.

        ``token_id`` at ``position`` is the token that was read last, and the last in ``arena``.
        """
        with self.model.here():
            return not_finite(self.model, token_id, position, arena)
