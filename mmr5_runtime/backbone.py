"""What an engine runs: the network itself, whoever computes it.

There are two: :class:`~mmr5_runtime.model.Model` in PyTorch with the kernels of this package, and
:class:`~mmr5_runtime.onnx.model.OnnxModel` in ONNX Runtime. Both read and write the same arenas in
place, so that everything above (segments, forks, drafts, windows, stopping) is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.rope import Grid
from mmr5_runtime.spec import ModelSpec


class Backbone(Protocol):
    """Vision tower, embedding table, decoder layers and head of one checkpoint on one device.

    It keeps nothing of a request.
    """

    spec: ModelSpec
    kv: KVFormat  # how its arenas keep keys and values

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: of embeddings, hidden states and arenas."""

    @property
    def device(self) -> torch.device: ...

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a decode step of one token reads: every linear once."""

    @property
    def independent_sequences(self) -> bool:
        """Whether the bits of a sequence's logits are the same alone and read with others."""

    def here(self) -> AbstractContextManager[object]:
        """Makes the device the current one, on which kernels are launched."""

    def new_arena(self, capacity: int) -> KVArena:
        """An empty arena for one sequence of at most ``capacity`` tokens."""

    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        """Patches [P, patch_dim] fp32 of one page, on any device -> [P / merge^2, hidden]."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 on the device -> embeddings [T, hidden]."""

    def read(
        self,
        embeds: Tensor,
        positions: Tensor,
        arenas: Sequence[KVArena],
        lengths: Sequence[int],
    ) -> Tensor:
        """Adds rows to one or several sequences; hidden states [M, hidden] of the last layer.

        embeds [M, hidden]; positions [3, M] int64, both on the device: ``lengths[i]`` rows of each
        arena, one sequence after the other. There is room for them; the arenas then hold them.
        """

    def logits(self, hidden: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Hidden states [M, hidden] -> [M, V] fp32.

        ``lengths`` are the rows of each sequence where there are several, as in :meth:`read`.
        """
