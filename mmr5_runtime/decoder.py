"""The language model: a stack of pre-norm layers over rows of tokens.

Linears, norms and rotations treat every row alike, so :class:`Decoder` works on M rows at once, be
they the T tokens of one prompt or the B x T new tokens of several sequences. Only attention cares
which row belongs to which sequence; that part is the argument ``attend``, supplied by
:func:`mmr5_runtime.model.prefill` and :func:`mmr5_runtime.model.decode_step`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mmr5_runtime.layers import GatedMLP, RMSNorm
from mmr5_runtime.linear import Linear
from mmr5_runtime.rope import TextRotary, apply_rotary
from mmr5_runtime.spec import TextSpec
from mmr5_runtime.weights import Weights

# (layer, q [M, H, D], k [M, K, D], v [M, K, D]) -> [M, H * D]; stores k and v as it goes.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# (layer, k [M, K, D] before rotation, v [M, K, D]); sees what positions have not touched yet.
Observe = Callable[[int, Tensor, Tensor], None]


def here(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: Triton launches on that, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class DecoderLayer(nn.Module):
    """Attention and gated MLP, each behind a norm and added to the residual stream."""

    def __init__(self, spec: TextSpec, weights: Weights, index: int) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        name, eps = f"model.layers.{index}", spec.rms_norm_eps
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        self.input_norm = RMSNorm(weights.tensor(f"{name}.input_layernorm.weight"), eps)
        self.post_norm = RMSNorm(weights.tensor(f"{name}.post_attention_layernorm.weight"), eps)
        self.qkv = weights.linear(*(f"{attention}.{part}_proj" for part in "qkv"))
        self.o_proj = weights.linear(f"{attention}.o_proj")
        self.mlp = GatedMLP(
            weights.linear(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            weights.linear(f"{mlp}.down_proj"),
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, observe: Observe | None = None
    ) -> Tensor:
        """x [M, hidden]; cos, sin [M, D/2] in the dtype of x -> [M, hidden]."""
        spec = self.spec
        qkv = self.qkv.fused(x, norm=self.input_norm.norm)
        qkv = qkv.unflatten(-1, (-1, spec.head_dim))  # [M, H + 2K, D]
        q, k, v = qkv.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        if observe is not None:
            observe(self.index, k, v)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        x = self.o_proj.fused(attend(self.index, q, k, v), residual=x)
        out: Tensor = self.mlp(x, self.post_norm, residual=x)
        return out


class Decoder(nn.Module):
    """Embedding table, layers, final norm and output head.

    Buffer ``embed_tokens`` [V, hidden]; a tied head shares its memory unless it is quantized.
    """

    embed_tokens: Tensor

    def __init__(self, spec: TextSpec, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("embed_tokens", weights.tensor("model.embed_tokens.weight"))
        self.rotary = TextRotary(spec, weights.device)
        self.layers = nn.ModuleList(DecoderLayer(spec, weights, i) for i in range(spec.num_layers))
        self.norm = RMSNorm(weights.tensor("model.norm.weight"), spec.rms_norm_eps)
        self.lm_head = (
            weights.shared_linear("the tied lm_head", self.embed_tokens)
            if spec.tie_word_embeddings and "lm_head" not in weights.formats
            else weights.linear("lm_head")
        )

    def forward(
        self, x: Tensor, positions: Tensor, attend: Attend, observe: Observe | None = None
    ) -> Tensor:
        """x [M, hidden] embeddings; positions [3, M] int64 -> hidden states [M, hidden].

        ``observe``, if given, is shown every layer's keys before they are rotated.
        """
        with here(x.device):
            cos, sin = (table.to(x.dtype) for table in self.rotary(positions))
            for layer in self.layers:
                x = layer(x, cos, sin, attend, observe)
        return x

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a decode step of one token reads: every linear once."""
        return sum(m.prepared.step_bytes for m in self.modules() if isinstance(m, Linear))

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states x [M, hidden] -> [M, V] fp32."""
        with here(x.device):
            out: Tensor = self.lm_head(self.norm(x))
            return out.float()
