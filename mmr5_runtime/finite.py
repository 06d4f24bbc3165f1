"""Where numbers went wrong: the first part of the model whose output is not finite.

Asked only once logits turned out to hold NaN or infinity, so it may take its time: the last token
is run again one part after the other, looking at every result on the way.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import embedding, silu

from mmr5_runtime.backbone import Backbone
from mmr5_runtime.decoder import DecoderLayer
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import Model, attend_one
from mmr5_runtime.rope import apply_rotary
from mmr5_runtime.types import EngineError

_REMEDY = (
    "the weights are damaged or the model overflows in this arithmetic: load with "
    "verify_hashes=True, or with dtype='float32'"
)
_NATIVE = "backend='native', which names the part"


@torch.no_grad()
def not_finite(model: Backbone, token_id: int, position: int, arena: KVArena) -> EngineError:
    """The error for logits that hold NaN or infinity, naming the first part that made them.

    ``token_id`` at ``position`` is the token that was read last, and the last in ``arena``.
    """
    if isinstance(model, Model):
        place = first_not_finite(model, token_id, position, arena)
        where = f"first in {place}" if place else "but not when that token was run again"
    else:
        where = f"first in {_in_arena(arena)}"
    remedy = _REMEDY if isinstance(model, Model) else _REMEDY.replace("dtype='float32'", _NATIVE)
    return EngineError(f"the logits are not finite, {where}; {remedy}.")


@torch.no_grad()
def first_not_finite(model: Model, token_id: int, position: int, arena: KVArena) -> str | None:
    """Name of the first part whose output for the last token is not finite; None when all are.

    Keys and values that earlier tokens left count as the part of their layer; in the first layer
    they come from the tokens before, so that only the page embeddings can be the cause.
    """
    decoder, device = model.decoder, model.device
    x = embedding(torch.tensor([token_id], device=device), decoder.embed_tokens)
    if not _finite(x):
        return f"the embedding of token {token_id}"
    places = torch.full((3, 1), position, device=device)
    cos, sin = (table.to(x.dtype) for table in decoder.rotary(places))
    arena.truncate(arena.length - 1)
    try:
        for module in decoder.layers:
            layer = cast(DecoderLayer, module)
            if (found := _in_layer(layer, x, cos, sin, arena)) is not None:
                return found
            x = layer(x, cos, sin, lambda *qkv: attend_one(arena, *qkv))
    finally:
        arena.advance(1)
    if not _finite(decoder.norm(x)):
        return "the final norm"
    return None if _finite(decoder.logits(x)) else "lm_head"


def _in_arena(arena: KVArena) -> str:
    """What the keys and values tell, of a model whose parts cannot be run one by one."""
    last = arena.length
    for index, (k, v) in enumerate(zip(arena.k, arena.v, strict=True)):
        if not (_finite(k[:, :last]) and _finite(v[:, :last])):
            before = f"layer {index - 1}" if index else "the embeddings"
            return f"{before}, or the keys and values of layer {index}"
    return "the last layer, the final norm or lm_head"


def _in_layer(
    layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, arena: KVArena
) -> str | None:
    """The first part of one layer that turns x [1, hidden] into something not finite."""
    name, spec = f"layer {layer.index}", layer.spec
    normed = layer.input_norm(x)
    if not _finite(normed):
        return f"{name}, input norm"
    qkv = layer.qkv(normed).unflatten(-1, (-1, spec.head_dim))
    if not _finite(qkv):
        return f"{name}, qkv_proj"
    q, k, v = qkv.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    seen = attend_one(arena, layer.index, q, k, v)
    if not _finite(seen):
        source = "" if layer.index else ", from the page embeddings"
        return f"{name}, attention over the keys and values of the tokens before{source}"
    x = x + layer.o_proj(seen)
    if not _finite(x):
        return f"{name}, o_proj"
    normed = layer.post_norm(x)
    if not _finite(normed):
        return f"{name}, post-attention norm"
    gate, up = layer.mlp.gate_up(normed).chunk(2, dim=-1)
    if not (_finite(gate) and _finite(up)):
        return f"{name}, gate_up_proj"
    hidden = silu(gate) * up
    if not _finite(hidden):
        return f"{name}, silu(gate) * up"
    return None if _finite(x + layer.mlp.down(hidden)) else f"{name}, down_proj"


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
