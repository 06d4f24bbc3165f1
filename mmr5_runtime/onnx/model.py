"""The network in ONNX Runtime: three graphs over the memory of torch tensors.

Inputs, outputs and the arenas are torch's; ONNX Runtime is given their addresses and copies nothing
of them. Keys and values of a layer are past and present at once: the same memory, which the graph
extends in place. Several sequences run one after the other, since every arena is memory of its own;
the numbers of one are therefore the same in any company.

The graphs are described in ``mmr5_export.onnx``; what is asked of them here is their inputs and
outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.decoder import here
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.onnx.files import DECODER, HEAD, VISION
from mmr5_runtime.onnx.session import input_dtype, open_session
from mmr5_runtime.onnx.windows import window_inputs
from mmr5_runtime.rope import Grid, TextRotary, vision_rotary
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.vision import check_page

_NUMPY = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int32: np.int32,
    torch.int64: np.int64,
}


class OnnxModel:
    """A :class:`~mmr5_runtime.backbone.Backbone` over the graphs of an engine folder."""

    kv: KVFormat = "bf16"

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        embed_tokens: Tensor,
        step_bytes: int,
        device: torch.device,
    ) -> None:
        """``embed_tokens`` [V, hidden] of any float dtype, on the device.

        Raises :class:`EngineError` where ONNX Runtime or a graph is missing or does not load.
        """
        self.spec = spec
        self._device = device
        self._embed_tokens = embed_tokens
        self._step_bytes = step_bytes
        self._rotary = TextRotary(spec.text, device)
        self._decoder = open_session(folder / DECODER, device)
        self._head = open_session(folder / HEAD, device)
        self._vision = open_session(folder / VISION, device)
        self._dtype = input_dtype(self._decoder, "embeds")
        self._bindings: WeakKeyDictionary[KVArena, Any] = WeakKeyDictionary()

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def step_bytes(self) -> int:
        return self._step_bytes

    @property
    def independent_sequences(self) -> bool:
        return True

    def here(self) -> AbstractContextManager[object]:
        return here(self._device)

    def new_arena(self, capacity: int) -> KVArena:
        return KVArena(self.spec.text, capacity, self.dtype, self.device)

    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        vision = self.spec.vision
        check_page(pixel_values, grid, vision)
        cos, sin = vision_rotary(grid, vision)
        windows, mask, places = window_inputs(grid, vision)
        inputs = {
            "pixels": pixel_values.to(self.dtype),
            "cos": cos.to(self.dtype),
            "sin": sin.to(self.dtype),
            "windows": windows,
            "window_mask": mask,
            "places": places,
        }
        tokens = len(pixel_values) // vision.merge_unit
        out = torch.empty(tokens, vision.out_hidden_size, dtype=self.dtype, device=self.device)
        self._run(self._vision, inputs, {"embeddings": out})
        return out

    def embed(self, token_ids: Tensor) -> Tensor:
        return embedding(token_ids, self._embed_tokens).to(self.dtype)

    def read(
        self,
        embeds: Tensor,
        positions: Tensor,
        arenas: Sequence[KVArena],
        lengths: Sequence[int],
    ) -> Tensor:
        """One sequence after the other; the arenas hold the rows when all have been run."""
        cos, sin = (table.to(self.dtype) for table in self._rotary(positions))
        hidden = torch.empty_like(embeds)
        parts = (rows.split(list(lengths)) for rows in (embeds, cos, sin, hidden))
        for arena, *rows in zip(arenas, *parts, strict=True):
            self._read_one(arena, *rows)
        for arena, tokens in zip(arenas, lengths, strict=True):
            arena.advance(tokens)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        size = (len(hidden), self.spec.text.vocab_size)
        out = torch.empty(size, dtype=self.dtype, device=self.device)
        self._run(self._head, {"hidden": hidden}, {"logits": out})
        return out.float()

    def _read_one(
        self, arena: KVArena, embeds: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor
    ) -> None:
        if arena not in self._bindings:
            self._bindings[arena] = self._bound_arena(arena)
        keys = arena.length + len(embeds)
        last_key = torch.tensor([keys - 1], dtype=torch.int32, device=self.device)
        # The length of the whole is read by the host on every provider.
        inputs = {"embeds": embeds, "cos": cos, "sin": sin, "last_key": last_key}
        inputs["keys"] = torch.tensor([keys], dtype=torch.int32)
        self._run(self._decoder, inputs, {"hidden": hidden}, self._bindings[arena])

    def _bound_arena(self, arena: KVArena) -> Any:
        """A binding in which every layer's past and present are the arena's memory."""
        binding = self._decoder.io_binding()
        for index, (k, v) in enumerate(zip(arena.k, arena.v, strict=True)):
            for name, held in (("key", k), ("value", v)):
                _bind(binding.bind_input, f"past_{name}.{index}", held[None])
                _bind(binding.bind_output, f"present_{name}.{index}", held[None])
        return binding

    def _run(
        self,
        session: Any,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
        binding: Any = None,
    ) -> None:
        """Runs a graph over the tensors' own memory, which is on the device unless it must not."""
        binding = binding or session.io_binding()
        # Held here while it runs: the binding knows addresses only.
        held = [
            value if name == "keys" else value.to(self.device).contiguous()
            for name, value in inputs.items()
        ]
        for name, value in zip(inputs, held, strict=True):
            _bind(binding.bind_input, name, value)
        for name, value in outputs.items():
            _bind(binding.bind_output, name, value)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        session.run_with_iobinding(binding)
        if self.device.type == "cuda":
            binding.synchronize_outputs()


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    kind = _NUMPY.get(tensor.dtype, 16)  # numpy has no bfloat16, which ONNX numbers 16
    device = tensor.device
    bind(name, device.type, device.index or 0, kind, list(tensor.shape), tensor.data_ptr())
