"""The KV arena: keys and values of one sequence in one preallocated block.

One contiguous block per sequence instead of pages and a block table: a rerank is a few long prompt
segments and a short answer, so nothing is ever shared inside a block, every attention kernel can
read it, and copying a remembered segment in or out is one slice per tensor.

A forward pass appends layer by layer and commits once, after the last layer. Until then ``length``
does not move, so a pass that fails half way leaves the arena as it was. Rewinding (another branch
from the same prompt, a rejected draft) is :meth:`KVArena.truncate`: it only moves ``length``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmr5_runtime.spec import TextSpec
from mmr5_runtime.types import ContextOverflowError, RequestError


class KVArena:
    """Keys ``k`` and values ``v``, each [L, K, capacity, D]; the first ``length`` tokens are valid.

    Keys are stored after rotation. Both tensors keep their address for the life of the arena.
    """

    def __init__(
        self,
        spec: TextSpec,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if capacity < 1:
            raise RequestError(f"a KV arena of {capacity} tokens is empty; give at least 1.")
        shape = (spec.num_layers, spec.num_kv_heads, capacity, spec.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self._length = 0
        self._appended = [0] * spec.num_layers  # tokens per layer since the last commit

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

        Returns that layer's keys and values including them, views of [K, S + T, D]. Writing a layer
        again before the commit overwrites its first writing.
        """
        self.require(k.shape[1])
        end = self._length + k.shape[1]
        self.k[layer, :, self._length : end] = k
        self.v[layer, :, self._length : end] = v
        self._appended[layer] = k.shape[1]
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def commit(self, tokens: int) -> None:
        """Makes the ``tokens`` that every layer appended part of the sequence."""
        if any(count != tokens for count in self._appended):
            raise RequestError(
                f"cannot commit {tokens} tokens: the layers appended {self._appended}; append the "
                "same number to every layer first."
            )
        self._length += tokens
        self._appended = [0] * len(self._appended)

    def view(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Committed keys and values ``start`` to ``end``, each [L, K, n, D]; copy them to keep."""
        if not 0 <= start <= end <= self._length:
            raise RequestError(
                f"cannot take tokens {start} to {end}; the arena holds {self._length}."
            )
        return self.k[:, :, start:end], self.v[:, :, start:end]

    def load(self, k: Tensor, v: Tensor) -> None:
        """Appends and commits n tokens that :meth:`view` showed of this or another arena.

        k, v [L, K, n, D] of the arena's dtype, on any device. The bits are copied, nothing else.
        """
        shape = (*self.k.shape[:2], k.shape[2], self.k.shape[3])
        if (tuple(k.shape), k.dtype) != (shape, self.k.dtype) or (v.shape, v.dtype) != (
            k.shape,
            k.dtype,
        ):
            raise RequestError(
                f"keys {list(k.shape)} {k.dtype} and values {list(v.shape)} {v.dtype} are not from "
                f"an arena like this one ({list(shape)}, {self.k.dtype})."
            )
        self.require(k.shape[2])
        cut = slice(self._length, self._length + k.shape[2])
        self.k[:, :, cut].copy_(k, non_blocking=True)
        self.v[:, :, cut].copy_(v, non_blocking=True)
        self._length = cut.stop
        self._appended = [0] * len(self._appended)

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
