"""The decoder as a decode step runs it: few kernels, all of them over every row at once.

The weights, norms and tables are those of :class:`~mmr5_runtime.decoder.Decoder`, prepared for the
kernels; what is rounded where is the same. A linear in a format that the decode kernels do not read
runs as it does elsewhere, with its norm, SwiGLU or residual in plain torch around it.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import embedding

from mmr5_kernels.dispatch import KERNELS, Prepared, choose, run_fused
from mmr5_kernels.fused import Norm
from mmr5_kernels.sequences import COLUMNS
from mmr5_kernels.table import DECODE_ROWS
from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.decoder import Decoder, DecoderLayer
from mmr5_runtime.types import EngineError


class Layer(NamedTuple):
    """One layer's weights, each [N, K], and the norms before attention and MLP."""

    input_norm: Norm
    qkv: Prepared
    o: Prepared
    post_norm: Norm
    gate_up: Prepared
    down: Prepared

    @classmethod
    def of(cls, layer: DecoderLayer) -> Layer:
        return cls(
            layer.input_norm.norm,
            layer.qkv.prepared,
            layer.o_proj.prepared,
            layer.post_norm.norm,
            layer.mlp.gate_up.prepared,
            layer.mlp.down.prepared,
        )

    @property
    def linears(self) -> tuple[Prepared, ...]:
        return self.qkv, self.o, self.gate_up, self.down


class FusedDecoder:
    """Called once per decode step; holds no state but weights and rotary tables.

    ``positions`` is how many rotary positions it knows, ``chunk`` the keys that attention takes at
    once: the unit of spans. ``independent`` says whether the bits of a row are the same in any
    company: they are where decode kernels serve every linear.
    """

    def __init__(self, decoder: Decoder, kv: KVFormat = "bf16") -> None:
        """Raises :class:`EngineError` for a model that the kernels of a step do not serve."""
        # Triton, which they import, is needed from here on and nowhere else.
        from mmr5_kernels.ops.decode_attention import CHUNK, decode_attention
        from mmr5_kernels.ops.rope_append import rope_append
        from mmr5_kernels.ops.step_checks import check_step

        spec, one_row = decoder.spec, decoder.embed_tokens[:1]
        table = torch.zeros(1, COLUMNS, dtype=torch.int64, device=one_row.device)
        try:
            check_step(one_row, table, 1, spec.num_heads, spec.num_kv_heads, spec.head_dim, kv)
        except ValueError as error:
            raise EngineError(
                f"the Triton kernels do not serve this model: {error} Load it with "
                "kernels='portable'."
            ) from error
        self._rope_append, self._attention = rope_append, decode_attention
        self._kv: KVFormat = kv
        self._heads, self._kv_heads = spec.num_heads, spec.num_kv_heads
        self._embeddings = decoder.embed_tokens
        self._layers = [Layer.of(cast(DecoderLayer, layer)) for layer in decoder.layers]
        self._norm = decoder.norm.norm
        self._head: Prepared = decoder.lm_head.prepared
        linears = [linear for layer in self._layers for linear in layer.linears]
        self.independent = all(map(_independent, [*linears, self._head]))
        self.chunk = CHUNK
        self.positions = spec.max_position_embeddings
        self.vocab_size = spec.vocab_size
        # By the very operations of a prefill, so that both rotate by the same values.
        with torch.no_grad():
            places = torch.arange(self.positions, device=self.device).expand(3, -1)
            cos, sin = decoder.rotary(places)
            dtype = self._embeddings.dtype
            self._cos, self._sin = (table.to(dtype).contiguous() for table in (cos, sin))

    @property
    def device(self) -> torch.device:
        return self._embeddings.device

    def __call__(
        self, ids: Tensor, positions: Tensor, table: Tensor, *, tokens: int, max_length: int
    ) -> Tensor:
        """Appends the tokens to their arenas; logits of all rows [B * T, V] in the compute dtype.

        ids, positions [B * T] int64, slot by slot; table [B, 6] int64 as in
        :mod:`mmr5_kernels.sequences`; ``max_length`` bounds the length of every slot with its T new
        tokens. Rows of slots without a sequence have logits that mean nothing.
        """
        x = embedding(ids, self._embeddings)
        for index, layer in enumerate(self._layers):
            qkv = run_fused(layer.qkv, x, norm=layer.input_norm)
            q = self._rope_append(
                qkv,
                positions,
                self._cos,
                self._sin,
                table,
                index,
                tokens=tokens,
                num_heads=self._heads,
                num_kv_heads=self._kv_heads,
                kv=self._kv,
            )
            seen = self._attention(
                q,
                table,
                index,
                tokens=tokens,
                num_kv_heads=self._kv_heads,
                max_length=max_length,
                kv=self._kv,
            )
            x = run_fused(layer.o, seen, residual=x)
            hidden = run_fused(layer.gate_up, x, norm=layer.post_norm, swiglu=True)
            x = run_fused(layer.down, hidden, residual=x)
        return run_fused(self._head, x, norm=self._norm)


def _independent(linear: Prepared) -> bool:
    """Whether one decode kernel computes it for every number of rows that a step has."""
    args = linear.format, linear.target, linear.dtype
    few, many = (choose(*args, rows, linear.n, linear.k) for rows in (1, DECODE_ROWS))
    return few == many and KERNELS[few].fused is not None
