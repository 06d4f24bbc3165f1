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
from mmr5_runtime.backbone import Backbone
from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.compute import Prefill
from mmr5_runtime.decoder import Attend, Decoder, here
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.rope import Grid
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.transfer import upload
from mmr5_runtime.types import EngineError, RequestError
from mmr5_runtime.vision import VisionTower
from mmr5_runtime.weights import Weights

MAX_DECODE_SEQUENCES = 8
MAX_DECODE_TOKENS = 8


class Model(nn.Module):
    """Qwen2.5-VL for still pages in PyTorch: ``visual`` and ``decoder``; a ``Backbone``.

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

    @property
    def step_bytes(self) -> int:
        return self.decoder.step_bytes

    @property
    def independent_sequences(self) -> bool:
        """Linears run over the rows of all sequences at once, and order sums by their number."""
        return False

    def here(self) -> AbstractContextManager[object]:
        return here(self.device)

    def new_arena(self, capacity: int) -> KVArena:
        return KVArena(self.spec.text, capacity, self.dtype, self.device, self.kv)

    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        embeddings: Tensor = self.visual(pixel_values.to(self.device), grid)
        return embeddings

    def embed(self, token_ids: Tensor) -> Tensor:
        return embedding(token_ids, self.decoder.embed_tokens)

    def read(
        self,
        embeds: Tensor,
        positions: Tensor,
        arenas: Sequence[KVArena],
        lengths: Sequence[int],
    ) -> Tensor:
        """Linears run once over all rows, attention per sequence."""
        attend: Attend = partial(attend_one, arenas[0])
        if len(arenas) > 1:
            attend = partial(_attend_each, arenas, lengths)
        hidden: Tensor = self.decoder(embeds, positions, attend)
        for arena, tokens in zip(arenas, lengths, strict=True):
            arena.commit(tokens)
        return hidden

    def logits(self, hidden: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """All rows at once, whatever sequence they are of."""
        return self.decoder.logits(hidden)


def native_model(model: Backbone) -> Model:
    """``model`` as the native one, whose layers can be run one by one.

    Raises :class:`EngineError` for one that is computed elsewhere.
    """
    if not isinstance(model, Model):
        raise EngineError(
            f"this needs the layers of the model one by one, and {type(model).__name__} runs them "
            "as a whole; load the engine with backend='native'."
        )
    return model


@torch.no_grad()
def embed_prompt(model: Backbone, token_ids: Tensor, image_embeds: Sequence[Tensor]) -> Tensor:
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
    embeds = model.embed(ids)
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
def read_tokens(model: Backbone, embeds: Tensor, positions: Tensor, arena: KVArena) -> Tensor:
    """Reads T tokens into ``arena``, behind the S it already holds, and predicts nothing.

    embeds [T, hidden] in the compute dtype; positions [3, T] int64. Returns the last layer's hidden
    states [T, hidden], which ``model.logits`` turns into predictions; the segments of a
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
        return model.read(embeds, positions.to(model.device), [arena], [tokens])


@torch.no_grad()
def prefill(
    model: Backbone, embeds: Tensor, positions: Tensor, arena: KVArena, all_logits: bool = False
) -> Tensor:
    """:func:`read_tokens`, and the fp32 logits of the last token [V], or of all [T, V].

    A prompt read in several calls gives the same keys, values and logits as in one, but for the
    last bits of sums; the same calls give the same bits. Raises :class:`RequestError` on shapes
    that do not agree and :class:`ContextOverflowError` when the arena is too small; the arena is
    then unchanged.
    """
    hidden = read_tokens(model, embeds, positions, arena)
    logits = model.logits(hidden if all_logits else hidden[-1:])
    return logits if all_logits else logits[0]


def attend_one(arena: KVArena, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence's q [T, H, D] over its arena extended by k, v [T, K, D] -> [T, H * D]."""
    return causal_attention(q, *arena.append(layer, k.transpose(0, 1), v.transpose(0, 1)))


def _attend_each(
    arenas: Sequence[KVArena],
    lengths: Sequence[int],
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """:func:`attend_one` for the rows of every sequence."""
    sequences = zip(arenas, *(rows.split(list(lengths)) for rows in (q, k, v)), strict=True)
    return torch.cat([attend_one(arena, layer, *qkv) for arena, *qkv in sequences])


@torch.no_grad()
def read_together(
    model: Backbone,
    embeds: Sequence[Tensor],
    positions: Sequence[Tensor],
    arenas: Sequence[KVArena],
) -> Tensor:
    """:func:`prefill` of B different sequences at once; fp32 logits [B, V] of their last tokens.

    Each embeds [T_i, hidden], positions [3, T_i]. Where linears run once over all rows
    (``independent_sequences`` is false) the last bits of a sequence's numbers depend on its
    company. Raises :class:`ContextOverflowError` when one arena is full; no arena is changed then.
    """
    lengths = [len(part) for part in embeds]
    for arena, tokens in zip(arenas, lengths, strict=True):
        arena.require(tokens)
    rotary = torch.cat(list(positions), dim=1).to(model.device)
    with model.here():
        hidden = model.read(torch.cat(list(embeds)), rotary, arenas, lengths)
    last = torch.tensor(lengths).cumsum(0) - 1
    return model.logits(hidden[last.to(model.device)], [1] * len(lengths))


@torch.no_grad()
def decode_step(
    model: Backbone, token_ids: Tensor, positions: Tensor, arenas: Sequence[KVArena]
) -> Tensor:
    """Adds T tokens to each of B sequences of any lengths; 1 <= B <= 8, 1 <= T <= 8.

    token_ids [B, T] int64; positions [B, T] int64, the rotary position of a text token (the same on
    all three axes); ``arenas`` one per sequence. Returns logits [B, T, V] fp32.
    Raises :class:`RequestError` on other sizes and :class:`ContextOverflowError` when one arena is
    full; no arena is changed then.
    """
    batch, tokens = decode_shape(token_ids, positions, arenas)
    for arena in arenas:
        arena.require(tokens)
    embeds = model.embed(upload(token_ids, model.device).flatten())
    rotary = upload(positions, model.device).flatten().expand(3, -1)
    lengths = [tokens] * batch
    hidden = model.read(embeds, rotary, arenas, lengths)
    return model.logits(hidden, lengths).view(batch, tokens, -1)


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
