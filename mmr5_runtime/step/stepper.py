"""From token ids of several sequences to the logits after each of them, on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from mmr5_runtime.compute import Compute
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import Model
from mmr5_runtime.step.buckets import Bucket, pick
from mmr5_runtime.step.fused import FusedDecoder
from mmr5_runtime.step.graphs import EagerRecorder, GraphRecorder, Recordings, Run
from mmr5_runtime.step.inputs import InputBuffer
from mmr5_runtime.types import RequestError


def make_stepper(model: Model, compute: Compute) -> Stepper:
    """The stepper of a model; raises :class:`EngineError` for one the kernels do not serve."""
    with model.here():
        return Stepper(FusedDecoder(model.decoder, model.kv), compute.graphs)


class Stepper:
    """Steps of one decoder, recorded by bucket. One thread and one stream at a time."""

    def __init__(self, decoder: FusedDecoder, graphs: bool) -> None:
        self._decoder = decoder
        self.chunk, self.independent = decoder.chunk, decoder.independent
        self._inputs = InputBuffer(decoder.device, decoder.vocab_size)
        recorder = GraphRecorder(decoder.device) if graphs else EagerRecorder()
        # Not a method of this object: recordings that kept it would keep the weights of a model
        # that was closed, until the collector of cycles comes by.
        self.recordings = Recordings(recorder, partial(_over_inputs, decoder, self._inputs))

    def step(self, token_ids: Tensor, positions: Tensor, arenas: Sequence[KVArena]) -> Tensor:
        """Adds T tokens to each of B: ids, positions [B, T] int64 -> logits [B, T, V] fp32.

        The logits are the caller's own: later steps do not touch them. Nothing here waits for the
        device. Raises :class:`RequestError` for a position that the rotary tables do not have or an
        id that the vocabulary does not, as far as they are on the host.
        """
        batch, tokens = token_ids.shape
        self._check(token_ids, self._decoder.vocab_size, "token id")
        self._check(positions, self._decoder.positions, "position")
        longest = max(arena.length for arena in arenas)
        bucket = pick(batch, tokens, longest, self._decoder.chunk)
        self._inputs.fill(bucket, token_ids, positions, arenas)
        rows = self.recordings.get(bucket).replay(bucket)
        asked = rows.view(bucket.sequences, bucket.tokens, -1)[:batch, :tokens]
        return asked.to(torch.float32, copy=True)

    def record(self, buckets: Iterable[Bucket]) -> None:
        """Records ``buckets`` now, the largest first: smaller ones then fit into its memory."""
        for bucket in sorted(buckets, key=lambda b: (b.rows, b.span), reverse=True):
            self._inputs.clear(bucket)
            self.recordings.get(bucket).replay(bucket)

    @staticmethod
    def _check(values: Tensor, end: int, name: str) -> None:
        if values.device.type != "cpu":
            return
        low, high = values.aminmax()
        if not 0 <= int(low) <= int(high) < end:
            raise RequestError(
                f"a decode step was given {name} {int(low if low < 0 else high)}, but this model "
                f"has 0 to {end - 1}; use the tokenizer and the context of this engine."
            )


def _over_inputs(decoder: FusedDecoder, inputs: InputBuffer, bucket: Bucket) -> Run:
    """The step of a bucket, over what the input buffer holds when it runs."""
    views = inputs.views(bucket)
    return partial(decoder, *views, tokens=bucket.tokens, max_length=bucket.span)
