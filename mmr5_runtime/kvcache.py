"""The KV arena: keys and values of one sequence in one preallocated block.

One contiguous block per sequence instead of pages and a block table: a rerank is a few long prompt
segments and a short answer, so nothing is ever shared inside a block, every attention kernel can
read it, and copying a remembered segment in or out is one slice per tensor.

A forward pass appends layer by layer and commits once, after the last layer. Until then ``length``
does not move, so a pass that fails half way leaves the arena as it was. Rewinding (another branch
from the same prompt, a rejected draft) is :meth:`KVArena.truncate`: it only moves ``length``.

With ``kv="int8"`` the arena holds 8-bit codes with one scale per token and head, half the memory
and half the reading of a decode step. Whoever attends over an arena sees what is stored, the tokens
of its own pass included: reading a segment and loading it later then lead to the same bits.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from mmr5_kernels.attention_reference import dequantize_kv, quantize_kv
from mmr5_kernels.sequences import Sequence
from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.spec import TextSpec
from mmr5_runtime.types import ContextOverflowError, RequestError

_SCALE_BYTES = torch.float32.itemsize


class KVArena:
    """Keys ``k`` and values ``v``, each [L, K, capacity, D]; the first ``length`` tokens are valid.

    Keys are stored after rotation. With ``kv="bf16"`` the tensors have the compute dtype; with
    ``kv="int8"`` they are codes, and ``k_scales``, ``v_scales`` [L, K, capacity] fp32 belong to
    them (otherwise None). All keep their address for the life of the arena.
    """

    def __init__(
        self,
        spec: TextSpec,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv: KVFormat = "bf16",
    ) -> None:
        if capacity < 1:
            raise RequestError(f"a KV arena of {capacity} tokens is empty; give at least 1.")
        if kv not in get_args(KVFormat):
            raise RequestError(f"kv={kv!r} is unknown; pass bf16 or int8.")
        shape = (spec.num_layers, spec.num_kv_heads, capacity, spec.head_dim)
        stored = torch.int8 if kv == "int8" else dtype
        # Nothing is ever read behind the tokens that were written, so that nothing need be cleared.
        # On a GPU that would write gigabytes for a long context; a CPU gets its zeros for nothing.
        new = torch.empty if torch.device(device).type == "cuda" else torch.zeros
        self.k, self.v = (new(shape, dtype=stored, device=device) for _ in range(2))
        self.k_scales: Tensor | None = None
        self.v_scales: Tensor | None = None
        if kv == "int8":
            self.k_scales, self.v_scales = (
                new(shape[:3], dtype=torch.float32, device=device) for _ in range(2)
            )
        self.kv: KVFormat = kv
        self.dtype = dtype
        self.capacity = capacity
        self._length = 0
        self._appended = [0] * spec.num_layers  # tokens per layer since the last commit

    @property
    def sequence(self) -> Sequence:
        """The arena's row of a sequence table, as decode kernels read it."""
        scales = (0, 0)
        if self.k_scales is not None and self.v_scales is not None:
            scales = (self.k_scales.data_ptr(), self.v_scales.data_ptr())
        return Sequence(self.k.data_ptr(), self.v.data_ptr(), self.capacity, self._length, *scales)

    @property
    def length(self) -> int:
        """Committed tokens: S of the next call. Appended but uncommitted tokens do not count."""
        return self._length

    def require(self, tokens: int) -> None:
        """Raises :class:`ContextOverflowError` unless ``tokens`` more fit."""
        if self._length + tokens > self.capacity:
            raise ContextOverflowError(
                f"{tokens} more tokens do not fit beside the {self._length} of a context of "
                f"{self.capacity}; send fewer or smaller pages, or load with a longer context."
            )

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [K, T, D] of one layer behind the committed tokens.

        Returns that layer's keys and values including them, [K, S + T, D] in the compute dtype:
        views, or what the codes stand for. Writing a layer again before the commit overwrites its
        first writing.
        """
        self.require(k.shape[1])
        end = self._length + k.shape[1]
        self._appended[layer] = k.shape[1]
        return (
            self._write(self.k[layer], self.k_scales, layer, k, end),
            self._write(self.v[layer], self.v_scales, layer, v, end),
        )

    def _write(
        self, held: Tensor, scales: Tensor | None, layer: int, new: Tensor, end: int
    ) -> Tensor:
        """Writes new [K, T, D] up to ``end`` of held [K, capacity, D]; all of it up to there."""
        if scales is None:
            held[:, self._length : end] = new
            return held[:, :end]
        codes, scale = quantize_kv(new)
        held[:, self._length : end] = codes
        scales[layer, :, self._length : end] = scale
        return dequantize_kv(held[:, :end], scales[layer, :, :end], self.dtype)

    def commit(self, tokens: int) -> None:
        """Makes the ``tokens`` that every layer appended part of the sequence."""
        if any(count != tokens for count in self._appended):
            raise RequestError(
                f"cannot commit {tokens} tokens: the layers appended {self._appended}; append the "
                "same number to every layer first."
            )
        self.advance(tokens)

    def advance(self, tokens: int) -> None:
        """Makes ``tokens`` that kernels wrote behind the committed ones part of the sequence."""
        self.require(tokens)
        self._length += tokens
        self._appended = [0] * len(self._appended)

    def view(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Committed keys and values ``start`` to ``end``, each [L, K, n, D]; copy them to keep.

        8-bit ones come as bytes, [L, K, n, D + 4] uint8: the codes of a head and then its scale.
        """
        if not 0 <= start <= end <= self._length:
            raise RequestError(
                f"cannot take tokens {start} to {end}; the arena holds {self._length}."
            )
        cut = slice(start, end)
        return _joined(self.k, self.k_scales, cut), _joined(self.v, self.v_scales, cut)

    def load(self, k: Tensor, v: Tensor) -> None:
        """Appends and commits n tokens that :meth:`view` showed of this or another arena.

        k, v as :meth:`view` gives them of an arena with these sizes, dtype and ``kv``; on any
        device. The bits are copied, nothing else.
        """
        layers, heads, _, dim = self.k.shape
        coded = self.kv == "int8"
        shape = (layers, heads, k.shape[2], dim + _SCALE_BYTES * coded)
        dtype = torch.uint8 if coded else self.k.dtype
        if (tuple(k.shape), k.dtype) != (shape, dtype) or (v.shape, v.dtype) != (k.shape, k.dtype):
            raise RequestError(
                f"keys {list(k.shape)} {k.dtype} and values {list(v.shape)} {v.dtype} are not from "
                f"an arena like this one ({list(shape)}, {dtype})."
            )
        self.require(k.shape[2])
        cut = slice(self._length, self._length + k.shape[2])
        _split(k, self.k, self.k_scales, cut)
        _split(v, self.v, self.v_scales, cut)
        self.advance(k.shape[2])

    def truncate(self, length: int) -> None:
        """Rewinds to the first ``length`` tokens; what came later, committed or not, is gone."""
        if not 0 <= length <= self._length:
            raise RequestError(
                f"cannot truncate to {length} tokens; the arena holds {self._length}."
            )
        self._length = length
        self._appended = [0] * len(self._appended)

    def reset(self) -> None:
        """Empties the arena; the memory stays."""
        self.truncate(0)


def _joined(held: Tensor, scales: Tensor | None, cut: slice) -> Tensor:
    """The tokens ``cut`` of held [L, K, capacity, D], with their scales behind them as bytes."""
    part = held[:, :, cut]
    if scales is None:
        return part
    behind = scales[:, :, cut].unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat((part.view(torch.uint8), behind), dim=-1)


def _split(joined: Tensor, held: Tensor, scales: Tensor | None, cut: slice) -> None:
    """Writes what :func:`_joined` gave, from any device, to the tokens ``cut``."""
    if scales is None:
        held[:, :, cut].copy_(joined, non_blocking=True)
        return
    # Moved in one piece and taken apart there: only whole page-locked blocks are copied at once.
    joined = joined.to(held.device, non_blocking=True)
    codes, behind = joined.split((held.shape[-1], _SCALE_BYTES), dim=-1)
    held[:, :, cut] = codes.view(torch.int8)
    scales[:, :, cut] = behind.contiguous().view(torch.float32).squeeze(-1)
