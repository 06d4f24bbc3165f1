"""The least work of every target: bytes through memory and operations, from the spec alone.

A *part* is work that waits for what comes before it; a floor is the sum over parts of the larger
of bytes over the memory rate and operations over the rate of the unit that does them. Both rates
are ceilings measured in the same run, so no version gets below it by much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmr5_kernels.layout import Format
from mmr5_runtime.capacity import KVFormat, kv_bytes_per_token
from mmr5_runtime.compute import DTYPES
from mmr5_runtime.spec import ModelSpec, linear_shapes, stored_tensors

_BF16 = DTYPES["bfloat16"]
_BYTES = _BF16.itemsize


@dataclass(frozen=True)
class Part:
    """``nbytes`` through memory, and ``flops`` (a multiply-add is two) by the unit of ``rate``.

    ``rate`` is ``bfloat16``, ``int8``, ``fp8`` or ``float32``.
    """

    nbytes: float
    flops: float
    rate: str = "bfloat16"

    def times(self, count: float) -> Part:
        """The same work ``count`` times."""
        return Part(self.nbytes * count, self.flops * count, self.rate)


def floor_ms(parts: Sequence[Part], ceilings: Mapping[str, Any]) -> float:
    """Least milliseconds of ``parts`` one after the other at the measured ``ceilings``.

    A rate that was not measured is taken to be that of bfloat16, or the fastest there is.
    """
    rates: Mapping[str, float] = ceilings["matmul_flops"]
    memory: float = ceilings["memory_bytes_per_s"]

    def seconds(part: Part) -> float:
        rate = rates.get(part.rate) or rates.get("bfloat16") or max(rates.values())
        return max(part.nbytes / memory, part.flops / rate)

    return 1e3 * math.fsum(seconds(part) for part in parts)


@dataclass(frozen=True)
class ModelWork:
    """The work of one model whose linears are stored as ``formats``; dense ones are bf16.

    ``prefill`` is what prompts are multiplied in: ``exact`` (bf16), ``int8`` or ``fp8``. ``kv`` is
    how keys and values are kept.
    """

    spec: ModelSpec
    formats: Mapping[str, Format]
    prefill: str = "exact"
    kv: KVFormat = "bf16"

    def linear(self, names: Sequence[str], rows: int) -> Part:
        """Linears of one input at ``rows`` rows: weights, input and output once each."""
        stored = stored_tensors(self.spec, self.formats)
        shapes = linear_shapes(self.spec, self.formats)
        weight = sum(
            dtype.itemsize * math.prod(size)
            for key, (size, dtype) in stored.items()
            if key.rpartition(".")[0] in names and not key.endswith("weight_shape")
        )
        n, k = sum(shapes[name][0] for name in names), shapes[names[0]][1]
        return Part(weight + _BYTES * rows * (n + k), 2.0 * rows * n * k)

    def decode_step(self, cached: int, tokens: int = 1) -> list[Part]:
        """One step of ``tokens`` behind ``cached``: every weight once, the arena once."""
        text = self.spec.text
        per_token = kv_bytes_per_token(text, _BF16, self.kv)
        pairs = 4.0 * text.q_size * text.num_layers * tokens * (cached + tokens)
        return [
            self._weights(self._decoder_linears(), tokens),
            Part(per_token * (cached + tokens), pairs),
            self._weights(["lm_head"], tokens),
        ]

    def decode_attention(self, cached: int) -> list[Part]:
        """One layer, one query over ``cached`` keys and values."""
        text = self.spec.text
        per_token = kv_bytes_per_token(text, _BF16, self.kv) / text.num_layers
        return [Part(per_token * cached, 4.0 * text.q_size * cached)]

    def prefill_tokens(self, tokens: int) -> list[Part]:
        """A fresh prompt: linears in the prefill's arithmetic, causal attention in bf16."""
        text = self.spec.text
        rate = "bfloat16" if self.prefill == "exact" else self.prefill
        linears = self._weights(self._decoder_linears(), tokens)
        attention = 2.0 * text.q_size * text.num_layers * tokens * (tokens + 1)
        kv = kv_bytes_per_token(text, _BF16, self.kv) * tokens
        return [Part(linears.nbytes, linears.flops, rate), Part(kv, attention)]

    def vision(self, grid_rows: int, grid_columns: int) -> list[Part]:
        """One page of ``grid_rows`` x ``grid_columns`` patches: linears, windows, whole page."""
        vision = self.spec.vision
        patches = grid_rows * grid_columns
        shapes = linear_shapes(self.spec, self.formats)
        block = [(name, size) for name, size in shapes.items() if name.startswith("visual.blocks.")]
        merger = [
            (name, size) for name, size in shapes.items() if name.startswith("visual.merger.")
        ]
        merged = patches // vision.merge_unit
        flops = 2.0 * patches * sum(n * k for _, (n, k) in block)
        flops += 2.0 * merged * sum(n * k for _, (n, k) in merger)
        flops += 2.0 * patches * vision.patch_dim * vision.hidden_size
        weights = self._stored("visual.")
        whole = len(vision.fullatt_block_indexes)
        side = vision.window_size // vision.patch_size
        window = min(side, grid_rows) * min(side, grid_columns)
        attention = 4.0 * vision.hidden_size * patches
        return [
            Part(weights, flops),
            Part(0, attention * window * (vision.depth - whole)),
            Part(0, attention * patches * whole),
        ]

    def rerank(
        self, grids: Sequence[tuple[int, int]], prompt: int, written: int, *, seen: bool
    ) -> list[Part]:
        """A whole list: its pages (none where they were ``seen``), the prompt, the answer."""
        parts = [] if seen else [part for grid in grids for part in self.vision(*grid)]
        parts += self.prefill_tokens(prompt)
        for part in self.decode_step(prompt + written // 2):  # in the middle of the answer
            parts.append(part.times(written))
        return parts

    def _decoder_linears(self) -> list[str]:
        shapes = linear_shapes(self.spec, self.formats)
        return [name for name in shapes if name.startswith("model.layers.")]

    def _weights(self, names: Sequence[str], rows: int) -> Part:
        stored = stored_tensors(self.spec, self.formats)
        shapes = dict(linear_shapes(self.spec, self.formats))
        text = self.spec.text
        shapes.setdefault("lm_head", (text.vocab_size, text.hidden_size))
        wanted = set(names)
        nbytes = sum(
            dtype.itemsize * math.prod(size)
            for key, (size, dtype) in stored.items()
            if key.rpartition(".")[0] in wanted and not key.endswith("weight_shape")
        )
        return Part(nbytes, 2.0 * rows * sum(n * k for n, k in (shapes[name] for name in names)))

    def _stored(self, start: str) -> float:
        stored = stored_tensors(self.spec, self.formats).items()
        return float(
            sum(d.itemsize * math.prod(size) for key, (size, d) in stored if key.startswith(start))
        )
