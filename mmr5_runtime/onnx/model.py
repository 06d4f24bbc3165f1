"""The network in ONNX Runtime: three graphs over the memory of torch tensors, on the CPU.

Inputs, outputs and the arenas are torch's; ONNX Runtime is given their addresses and copies nothing
of them. Keys and values of a layer are past and present at once: the same memory, which the graph
extends in place. Several sequences run one after the other, since every arena is memory of its own,
and so does the head: the numbers of one are the same in any company.

The graphs are described in ``mmr5_export.onnx``; what is asked of them here is their inputs and
outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.onnx.files import DECODER, HEAD, VISION
from mmr5_runtime.onnx.session import bind, open_session, run
from mmr5_runtime.onnx.windows import window_inputs
from mmr5_runtime.rope import Grid, TextRotary, vision_angles
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.vision import check_page

_CPU = torch.device("cpu")


def rotations(angles: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of angles [N, D/2] fp32, by the calling thread alone.

    torch hands even the few of a decode step of 8 tokens to its other threads, which then spin for
    milliseconds on the cores that the next graph computes on (docs/LOG.md).
    """
    values = angles.numpy()
    return torch.from_numpy(np.cos(values)), torch.from_numpy(np.sin(values))


class OnnxModel:
    """A :class:`~mmr5_runtime.backbone.Backbone` over the graphs of an engine folder; fp32."""

    kv: KVFormat = "bf16"  # as they are computed

    def __init__(
        self, folder: Path, spec: ModelSpec, embed_tokens: Tensor, step_bytes: int
    ) -> None:
        """``embed_tokens`` [V, hidden] of any float dtype, on the CPU.

        Raises :class:`EngineError` where ONNX Runtime or a graph is missing or does not load,
        ``MemoryError`` where the weights do not fit.
        """
        self.spec = spec
        self._embed_tokens = embed_tokens
        self._step_bytes = step_bytes
        self._rotary = TextRotary(spec.text)
        self._decoder = open_session(folder / DECODER)
        self._head = open_session(folder / HEAD)
        self._vision = open_session(folder / VISION)
        self._bindings: WeakKeyDictionary[KVArena, Any] = WeakKeyDictionary()

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return _CPU

    @property
    def step_bytes(self) -> int:
        return self._step_bytes

    @property
    def independent_sequences(self) -> bool:
        return True

    def here(self) -> AbstractContextManager[object]:
        return nullcontext()

    def new_arena(self, capacity: int) -> KVArena:
        return KVArena(self.spec.text, capacity)

    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        vision = self.spec.vision
        check_page(pixel_values, grid, vision)
        cos, sin = rotations(vision_angles(grid, vision))
        windows, mask, places = window_inputs(grid, vision)
        inputs = {"pixels": pixel_values.to(_CPU, torch.float32), "cos": cos, "sin": sin}
        inputs |= {"windows": windows, "window_mask": mask, "places": places}
        out = torch.empty(len(pixel_values) // vision.merge_unit, vision.out_hidden_size)
        run(self._vision, inputs, {"embeddings": out})
        return out

    def embed(self, token_ids: Tensor) -> Tensor:
        return embedding(token_ids, self._embed_tokens).float()

    def read(
        self,
        embeds: Tensor,
        positions: Tensor,
        arenas: Sequence[KVArena],
        lengths: Sequence[int],
    ) -> Tensor:
        """One sequence after the other; the arenas hold the rows when all have been run."""
        cos, sin = rotations(self._rotary.angles(positions))
        hidden = torch.empty(embeds.shape)
        parts = (rows.split(list(lengths)) for rows in (embeds, cos, sin, hidden))
        for arena, *rows in zip(arenas, *parts, strict=True):
            self._read_one(arena, *rows)
        for arena, tokens in zip(arenas, lengths, strict=True):
            arena.advance(tokens)
        return hidden

    def logits(self, hidden: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        out = torch.empty(len(hidden), self.spec.text.vocab_size)
        sizes = [len(hidden)] if lengths is None else list(lengths)
        for rows, scores in zip(hidden.split(sizes), out.split(sizes), strict=True):
            run(self._head, {"hidden": rows}, {"logits": scores})
        return out

    def _read_one(
        self, arena: KVArena, embeds: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor
    ) -> None:
        if arena not in self._bindings:
            self._bindings[arena] = self._bound_arena(arena)
        keys = torch.tensor([arena.length + len(embeds)], dtype=torch.int32)
        inputs = {"embeds": embeds, "cos": cos, "sin": sin, "last_key": keys - 1, "keys": keys}
        run(self._decoder, inputs, {"hidden": hidden}, self._bindings[arena])

    def _bound_arena(self, arena: KVArena) -> Any:
        """A binding in which every layer's past and present are the arena's memory."""
        binding = self._decoder.io_binding()
        for index, (k, v) in enumerate(zip(arena.k, arena.v, strict=True)):
            for name, held in (("key", k), ("value", v)):
                bind(binding.bind_input, f"past_{name}.{index}", held[None])
                bind(binding.bind_output, f"present_{name}.{index}", held[None])
        return binding
