"""The whole model, and the calls a rerank is made of.

``embed_prompt`` puts page embeddings into the token embeddings, ``read_tokens`` reads a prompt (or
the next segment of one) into a KV arena, ``prefill`` also predicts what comes next, ``decode_step``
adds a few tokens to a few sequences. Prefill and decode are two functions because they meet
different shapes: one long sequence, or M = B x T of at most 64 rows whose cost is the reading of
the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from mmr5_kernels.layout import Format
from mmr5_kernels.target import Target
from mmr5_runtime.attention import causal_attention
from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.compute import Prefill
from mmr5_runtime.decoder import Decoder, here
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.transfer import upload
from mmr5_runtime.types import RequestError
from mmr5_runtime.vision import VisionTower
from mmr5_runtime.weights import Weights

MAX_DECODE_SEQUENCES = 8
MAX_DECODE_TOKENS = 8


class Model(nn.Module):
    """Qwen2.5-VL for still pages: ``visual`` and ``decoder``. It keeps nothing of a request.

    ``kv`` says how the arenas it makes keep keys and values: in the compute dtype, or in 8 bits.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, kv: KVFormat = "bf16") -> None:
        super().__init__()
        self.spec, self.kv = spec, kv
        self.visual = VisionTower(spec.vision, weights)
        self.decoder = Decoder(spec.text, weights)

    @classmethod
    def from_tensors(
        cls,
        spec: ModelSpec,
        get: Callable[[str], Tensor],
        formats: Mapping[str, Format] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        target: Target | None = None,
        prefill: Prefill = "exact",
        kv: KVFormat = "bf16",
    ) -> Model:
        """Builds the model from tensors fetched one at a time.

        ``get(name)`` returns the stored tensor of a canonical name; ``formats`` maps a linear to
        its storage format where it is not dense; ``dtype`` (fp32 or bf16) is what is computed in.
        ``target`` says which kernels may run, by default what :meth:`Target.of` says of ``device``;
        ``prefill`` and ``kv`` are those of :class:`~mmr5_runtime.compute.Compute`.
        Raises :class:`CheckpointError` naming a tensor that is missing or has another shape or
        dtype than the config and the format say, :class:`EngineError` for formats that do not fit.
        """
        weights = Weights(spec, get, formats or {}, dtype, device, target=target, prefill=prefill)
        return cls(spec, weights, kv)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.decoder.embed_tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.device

    def here(self) -> AbstractContextManager[object]:
        """Makes the model's GPU the current one, on which kernels are launched."""
        return here(self.device)

    def new_arena(self, capacity: int) -> KVArena:
        """An empty KV arena for one sequence of at most ``capacity`` tokens."""
        return KVArena(self.spec.text, capacity, self.dtype, self.device, self.kv)


@torch.no_grad()
def embed_prompt(model: Model, token_ids: Tensor, image_embeds: Sequence[Tensor]) -> Tensor:
    """Embeddings of a prompt, with the pages' embeddings in place of their image tokens.

    ``token_ids`` [T] int64; ``image_embeds`` one [tokens of the page, hidden] per page, in order.
    Returns [T, hidden] in the compute dtype. Raises :class:`RequestError` when an id is outside the
    vocabulary or the pages do not fill the image tokens exactly.
    """
    vocabulary = model.spec.text.vocab_size
    if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocabulary:
        raise RequestError(
            f"the prompt holds token ids outside the vocabulary of {vocabulary}; use the tokenizer "
            "that belongs to this checkpoint."
        )
    ids = token_ids.to(model.device)
    embeds = embedding(ids, model.decoder.embed_tokens)
    places = (ids == model.spec.image_token_id).nonzero().flatten()
    found = sum(len(page) for page in image_embeds)
    if found != len(places):
        raise RequestError(
            f"the prompt holds {len(places)} image tokens but {len(image_embeds)} pages gave "
            f"{found} embeddings; write every page's placeholder once per embedding."
        )
    if found:
        embeds[places] = torch.cat(list(image_embeds)).to(embeds)
    return embeds


@torch.no_grad()
def read_tokens(model: Model, embeds: Tensor, positions: Tensor, arena: KVArena) -> Tensor:
    """Reads T tokens into ``arena``, behind the S it already holds, and predicts nothing.

    embeds [T, hidden] in the compute dtype; positions [3, T] int64. Returns the last layer's hidden
    states [T, hidden], which :meth:`Decoder.logits` turns into predictions; the segments of a
    prompt before its last need none. Raises as :func:`prefill`.
    """
    tokens = embeds.shape[0]
    if tokens == 0 or tuple(positions.shape) != (3, tokens):
        raise RequestError(
            f"embeddings {list(embeds.shape)} and positions {list(positions.shape)} cannot be "
            "prefilled; give [T, hidden] and [3, T] with T at least 1."
        )
    arena.require(tokens)
    with model.here():
        attend = partial(attend_one, arena)
        hidden: Tensor = model.decoder(embeds, positions.to(model.device), attend)
    arena.commit(tokens)
    return hidden


@torch.no_grad()
def prefill(
    model: Model, embeds: Tensor, positions: Tensor, arena: KVArena, all_logits: bool = False
) -> Tensor:
    """:func:`read_tokens`, and the fp32 logits of the last token [V], or of all [T, V].

    A prompt read in several calls gives the same keys, values and logits as in one, but for the
    last bits of sums; the same calls give the same bits. Raises :class:`RequestError` on shapes
    that do not agree and :class:`ContextOverflowError` when the arena is too small; the arena is
    then unchanged.
    """
    hidden = read_tokens(model, embeds, positions, arena)
    logits = model.decoder.logits(hidden if all_logits else hidden[-1:])
    return logits if all_logits else logits[0]


def attend_one(arena: KVArena, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence's q [T, H, D] over its arena extended by k, v [T, K, D] -> [T, H * D]."""
    return causal_attention(q, *arena.append(layer, k.transpose(0, 1), v.transpose(0, 1)))


@torch.no_grad()
def read_together(
    model: Model,
    embeds: Sequence[Tensor],
    positions: Sequence[Tensor],
    arenas: Sequence[KVArena],
) -> Tensor:
    """:func:`prefill` of B different sequences at once; fp32 logits [B, V] of their last tokens.

    Each embeds [T_i, hidden], positions [3, T_i]. Linears run once over all rows, attention per
    sequence, so the last bits of a sequence's numbers depend on its company. Raises
    :class:`ContextOverflowError` when one arena is full; no arena is changed then.
    """
    lengths = [len(part) for part in embeds]
    for arena, tokens in zip(arenas, lengths, strict=True):
        arena.require(tokens)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences = zip(arenas, *(rows.split(lengths) for rows in (q, k, v)), strict=True)
        return torch.cat([attend_one(arena, layer, *qkv) for arena, *qkv in sequences])

    rotary = torch.cat(list(positions), dim=1).to(model.device)
    with model.here():
        hidden = model.decoder(torch.cat(list(embeds)), rotary, attend)
    for arena, tokens in zip(arenas, lengths, strict=True):
        arena.commit(tokens)
    last = torch.tensor(lengths).cumsum(0) - 1
    logits: Tensor = model.decoder.logits(hidden[last.to(model.device)])
    return logits


@torch.no_grad()
def decode_step(
    model: Model, token_ids: Tensor, positions: Tensor, arenas: Sequence[KVArena]
) -> Tensor:
    """Adds T tokens to each of B sequences of any lengths; 1 <= B <= 8, 1 <= T <= 8.

    token_ids [B, T] int64; positions [B, T] int64, the rotary position of a text token (the same on
    all three axes); ``arenas`` one per sequence. Linears run once over all B x T rows, attention
    per sequence. Returns logits [B, T, V] fp32. Raises :class:`RequestError` on other sizes and
    :class:`ContextOverflowError` when one arena is full; no arena is changed then.
    """
    batch, tokens = decode_shape(token_ids, positions, arenas)
    for arena in arenas:
        arena.require(tokens)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences = zip(arenas, *(rows.split(tokens) for rows in (q, k, v)), strict=True)
        return torch.cat([attend_one(arena, layer, *qkv) for arena, *qkv in sequences])

    ids = upload(token_ids, model.device)
    embeds = embedding(ids.flatten(), model.decoder.embed_tokens)
    rotary = upload(positions, model.device).flatten().expand(3, -1)
    logits = model.decoder.logits(model.decoder(embeds, rotary, attend))
    for arena in arenas:
        arena.commit(tokens)
    return logits.view(batch, tokens, -1)


def decode_shape(
    token_ids: Tensor, positions: Tensor, arenas: Sequence[KVArena]
) -> tuple[int, int]:
    """B and T of a decode step; :class:`RequestError` when its arguments do not make one."""
    batch, tokens = token_ids.shape if token_ids.ndim == 2 else (0, 0)
    if not (1 <= batch <= MAX_DECODE_SEQUENCES and 1 <= tokens <= MAX_DECODE_TOKENS):
        raise RequestError(
            f"a decode step takes 1 to {MAX_DECODE_TOKENS} tokens of 1 to {MAX_DECODE_SEQUENCES} "
            f"sequences, not token ids of shape {list(token_ids.shape)}; split them or use prefill."
        )
    different = len({id(arena) for arena in arenas})
    if positions.shape != token_ids.shape or not batch == len(arenas) == different:
        raise RequestError(
            f"token ids {list(token_ids.shape)} come with positions {list(positions.shape)} and "
            f"{len(arenas)} arenas; give one position per token and a different arena per sequence."
        )
    return batch, tokens
