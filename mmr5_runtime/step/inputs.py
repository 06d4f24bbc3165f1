"""What a decode step is told, at addresses that never change.

Ids, positions and the sequence table lie behind each other in one int64 buffer, filled by a single
copy per step. On a GPU that copy comes from page-locked memory and nobody waits for it: PyTorch
keeps such memory from being used again before the copy is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmr5_kernels.sequences import COLUMNS, sequence_rows, sequence_table
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.step.buckets import MAX_ROWS, SEQUENCES, Bucket

_SIZE = 2 * MAX_ROWS + COLUMNS * SEQUENCES[-1]


class StepInputs(NamedTuple):
    """Views of the buffer: ids [B * T], positions [B * T], table [B, 6], all int64."""

    ids: Tensor
    positions: Tensor
    table: Tensor


class InputBuffer:
    """The one buffer of an engine; every bucket uses the beginning of it."""

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        self._device = device
        self._last_id = vocab_size - 1
        self._buffer = torch.zeros(_SIZE, dtype=torch.int64, device=device)

    def views(self, bucket: Bucket) -> StepInputs:
        """Where a bucket's inputs lie."""
        return _split(self._buffer, bucket)

    def fill(
        self, bucket: Bucket, token_ids: Tensor, positions: Tensor, arenas: Sequence[KVArena]
    ) -> None:
        """Tells the next step: token_ids, positions [B, T] int64, one arena per sequence.

        Each of the two tensors may lie on the device, as ids that were just chosen there do, and is
        then copied from there without waiting. Such ids are clamped into the vocabulary: one that
        stands for "no token" must not end the process before the host has seen it. Slots that the
        bucket adds hold no sequence, tokens that it adds are id 0 at position 0.
        """
        # Built as plain numbers and made a tensor at once: this runs for every token, and an
        # operation on a small tensor costs more than the numbers in it.
        batch, tokens = token_ids.shape
        numbers = _padded(token_ids, bucket) + _padded(positions, bucket)
        slots = [arena.sequence for arena in arenas]
        for row in sequence_rows([*slots, *[None] * (bucket.sequences - batch)]):
            numbers += row
        pinned = self._device.type == "cuda"
        host = torch.tensor(numbers, dtype=torch.int64, pin_memory=pinned)
        self._buffer[: bucket.input_size].copy_(host, non_blocking=True)
        if token_ids.device.type == "cpu" and positions.device.type == "cpu":
            return
        there, shape = self.views(bucket), (bucket.sequences, bucket.tokens)
        if token_ids.device.type != "cpu":
            chosen = there.ids.view(shape)[:batch, :tokens]
            chosen.copy_(token_ids.clamp(0, self._last_id))
        if positions.device.type != "cpu":
            there.positions.view(shape)[:batch, :tokens].copy_(positions)

    def clear(self, bucket: Bucket) -> None:
        """Tells a step that has no sequence at all, as when it is only being recorded."""
        ids, positions, table = self.views(bucket)
        ids.zero_()
        positions.zero_()
        table.copy_(sequence_table([None] * bucket.sequences))


def _padded(values: Tensor, bucket: Bucket) -> list[int]:
    """values [B, T] of a step as the bucket has them, zeros added; zeros alone for a device's."""
    if values.device.type != "cpu":
        return [0] * bucket.rows
    missing = [0] * (bucket.tokens - values.shape[1])
    numbers = [number for row in values.tolist() for number in row + missing]
    return numbers + [0] * (bucket.rows - len(numbers))


def _split(buffer: Tensor, bucket: Bucket) -> StepInputs:
    rows = bucket.rows
    table = buffer[2 * rows : bucket.input_size].view(bucket.sequences, COLUMNS)
    return StepInputs(buffer[:rows], buffer[rows : 2 * rows], table)
