"""Pages read once and moved to wherever a prompt shows them: approximate, so only on request.

Exact reuse needs the same tokens in front, and in a prompt that puts the question first nothing in
front of a page survives a new question. Here a page is read once behind the engine's constant
instructions with a question that asks nothing (:func:`capture_pages`); what that leaves stands in
for the real keys and values later (:func:`read_relocated`). Three things about it are wrong:

* Its position. Repaired exactly: keys are kept before rotation and rotated to their true place, to
  the very bits the decoder would give. Turning keys on that were rotated and rounded to bf16 would
  change a quarter of them (Kamera, arXiv 2606.23581, and MEPIC, 2512.16822, keep them so too).
* Its beginning, which draws attention by being one. Labels, markers and the first image tokens are
  computed again in place (EPIC, 2410.15332).
* What it has not seen: the question and the pages before. The tokens the question attends to most
  are computed again as well (InfoFlow KV, 2603.05353). The others stay blind to both, and that is
  the approximation: a judge's choice between candidates suffers from it where single answers do not
  (2601.08343), so compare with exact reading before relying on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmr5_runtime.attention import causal_attention
from mmr5_runtime.decoder import Attend
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import Model, embed_prompt, read_tokens
from mmr5_runtime.reuse.relocate_rows import ProbePass, RowPass
from mmr5_runtime.reuse.relocate_store import RelocatablePage
from mmr5_runtime.rope import Grid, apply_rotary, mrope_positions
from mmr5_runtime.types import RequestError

# Asked while a page is captured: words that favour no page (in-context re-ranking, arXiv
# 2410.02642, calibrates with the same ones).
CONTENT_FREE_QUESTION = "N/A"


@dataclass(frozen=True)
class Recompute:
    """How much of every page is computed again in its true context.

    The first ``first_tokens`` image tokens, and of the others the ``share`` (0 to 1, rounded to
    whole tokens) that the question attends to most. Labels, markers and the tail always are. The
    defaults are EPIC's and InfoFlow's. Raises :class:`RequestError` for values out of range.
    """

    share: float = 0.15
    first_tokens: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not 0 <= self.share <= 1:
            raise RequestError(
                f"{self.share} is no share of a page that can be computed again; give 0 to 1."
            )
        if isinstance(self.first_tokens, bool) or self.first_tokens < 0:
            raise RequestError(
                f"the first {self.first_tokens} tokens of a page cannot be computed again; give 0 "
                "or more."
            )

    @property
    def asks(self) -> bool:
        """Whether the question decides what is computed again."""
        return 0 < self.share < 1


@dataclass(frozen=True, eq=False)
class PageSegment:
    """One page as a prompt shows it.

    ``token_ids`` the label if the segment has one, vision start, n image tokens, vision end;
    ``embeddings`` [n, hidden], what stands in for the image tokens; ``grid`` the page's patches.
    """

    token_ids: Sequence[int]
    embeddings: Tensor
    grid: Grid


@dataclass(frozen=True, eq=False)
class RelocatedRead:
    """What reading a prompt with relocated pages gave.

    ``logits`` [V] fp32 of the last tail token; ``position`` the rotary position of the token that
    comes next; ``computed`` tokens computed in place, tail included, and ``relocated`` image tokens
    that were only moved: together all that were read.
    """

    logits: Tensor
    position: int
    computed: int
    relocated: int


def capture_pages(
    model: Model, head_ids: Sequence[int], pages: Sequence[PageSegment]
) -> Iterator[RelocatablePage]:
    """Reads every page by itself behind the same head and yields what it leaves, in order.

    ``head_ids`` is the head of a prompt that asks :data:`CONTENT_FREE_QUESTION` about one page. It
    is read once for all pages, and none of them becomes the beginning of a prompt, which attention
    treats as special (CacheClip, arXiv 2510.10129). ``pages`` are segments of such prompts. What is
    yielded is on the model's device: drop each before taking the next. Raises :class:`RequestError`
    when the embeddings or the grid of a page do not fill its image tokens, and for an engine with
    8-bit keys and values.
    """
    if not pages:
        return  # and the head is not read for nothing
    head = torch.tensor(list(head_ids), dtype=torch.int64)
    positions, start = mrope_positions(head, [], model.spec)
    longest = max(len(page.token_ids) for page in pages)
    arena = model.new_arena(len(head) + longest)
    _refuse_codes(arena)
    read_tokens(model, embed_prompt(model, head, []), positions, arena)
    for page in pages:
        yield _capture(model, arena, start, page)


@torch.no_grad()
def _capture(model: Model, arena: KVArena, start: int, page: PageSegment) -> RelocatablePage:
    """Reads ``page`` behind the head in ``arena``, at position ``start``, and forgets it there."""
    ids = torch.tensor(list(page.token_ids), dtype=torch.int64)
    positions, _ = mrope_positions(ids, [page.grid], model.spec, start)
    image = (ids == model.spec.image_token_id).nonzero().flatten().to(model.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def observe(layer: int, k: Tensor, v: Tensor) -> None:
        keys.append(k[image].transpose(0, 1))
        values.append(v[image].transpose(0, 1))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, *arena.append(layer, k.transpose(0, 1), v.transpose(0, 1)))

    # Never committed, so that the next page stands behind the same head.
    embeds = embed_prompt(model, ids, [page.embeddings])
    model.decoder(embeds, positions.to(model.device), attend, observe)
    return RelocatablePage(torch.stack(keys), torch.stack(values), page.grid)


@torch.no_grad()
def read_relocated(
    model: Model,
    arena: KVArena,
    start: int,
    pages: Sequence[PageSegment],
    captured: Sequence[RelocatablePage],
    tail_ids: Sequence[int],
    question_ids: Sequence[int],
    recompute: Recompute,
) -> RelocatedRead:
    """Reads a prompt from its first relocated page to its end, behind what ``arena`` holds.

    The arena holds the head, with or without pages that were read exactly; ``start`` is the rotary
    position that comes next. ``pages`` are segments of the true prompt and ``captured`` what
    :func:`capture_pages` made of each, on any device. ``question_ids`` is the question alone: where
    ``recompute`` asks, it is read once more behind the pages, which is a forward pass of its own
    over the text, and forgotten. Afterwards the arena holds the whole prompt.

    Raises :class:`ContextOverflowError` when pages and tail do not fit, :class:`RequestError` when
    a page and its capture differ, when there are no tail or question tokens, or for an arena of
    8-bit keys and values. The arena holds what it held then.
    """
    _check(pages, captured, tail_ids, question_ids, recompute, arena)
    text = _Text.of(model, arena.length, start, pages, tail_ids)
    try:
        _claim_rows(arena, len(text.words))
        _move_in(model, arena, text, captured)
        again = text.words.clone()
        if recompute.share == 1:
            again[:] = True
        elif recompute.asks:
            mass = _question_mass(model, arena, text, question_ids)
            again[_most_attended(text, mass, recompute)] = True
        for image in text.images:
            again[image[: recompute.first_tokens]] = True
        rows = again.nonzero().flatten()
        hidden = _forward(model, RowPass(arena, text.held + rows).attend, *text.at(rows))
        logits = model.decoder.logits(hidden[-1:])[0]
    except BaseException:
        arena.truncate(text.held)
        raise
    return RelocatedRead(logits, text.following, len(rows), len(again) - len(rows))


@dataclass(frozen=True, eq=False)
class _Text:
    """The R tokens that are being read, behind ``held`` others in the arena.

    ``embeds`` [R, hidden]; ``positions`` [3, R] int64 on the CPU; ``words`` [R] bool on the CPU,
    False for image tokens; ``images`` which of the R are the image tokens of each page, int64;
    ``tail`` where the tail begins; ``following`` the position after the last token.
    """

    held: int
    embeds: Tensor
    positions: Tensor
    words: Tensor
    images: list[Tensor]
    tail: int
    following: int

    @classmethod
    def of(
        cls,
        model: Model,
        held: int,
        start: int,
        pages: Sequence[PageSegment],
        tail_ids: Sequence[int],
    ) -> _Text:
        ids = torch.tensor(
            [*(token for page in pages for token in page.token_ids), *tail_ids], dtype=torch.int64
        )
        grids = [page.grid for page in pages]
        positions, following = mrope_positions(ids, grids, model.spec, start)
        embeds = embed_prompt(model, ids, [page.embeddings for page in pages])
        is_image = ids == model.spec.image_token_id
        images = is_image.nonzero().flatten().split([len(page.embeddings) for page in pages])
        tail = len(ids) - len(tail_ids)
        return cls(held, embeds, positions, ~is_image, list(images), tail, following)

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [r, hidden] and positions [3, r] of the tokens ``rows`` [r]."""
        return self.embeds[rows.to(self.embeds.device)], self.positions[:, rows]


def _check(
    pages: Sequence[PageSegment],
    captured: Sequence[RelocatablePage],
    tail_ids: Sequence[int],
    question_ids: Sequence[int],
    recompute: Recompute,
    arena: KVArena,
) -> None:
    if not pages or len(pages) != len(captured):
        raise RequestError(
            f"{len(pages)} pages come with {len(captured)} captured ones; give at least one page "
            "and capture each first."
        )
    _refuse_codes(arena)
    layers, heads, _, dim = arena.k.shape
    for number, (page, source) in enumerate(zip(pages, captured, strict=True), start=1):
        shape = (layers, heads, len(page.embeddings), dim)
        found = {(tuple(part.shape), part.dtype) for part in (source.k, source.v)}
        if source.grid != page.grid or found != {(shape, arena.k.dtype)}:
            raise RequestError(
                f"relocated page {number} of grid {page.grid} comes with one captured from grid "
                f"{source.grid} or by another model; capture it again."
            )
    if not tail_ids:
        raise RequestError("a prompt without a tail predicts nothing; give the template's tail.")
    if recompute.asks and not question_ids:
        raise RequestError(
            f"a share of {recompute.share} is chosen by the question's attention, but the question "
            "has no tokens; give them, or a share of 0."
        )


def _refuse_codes(arena: KVArena) -> None:
    """Keys are rotated to where a page stands and rows replaced: codes would be rounded twice."""
    if arena.kv != "bf16":
        raise RequestError(
            f"pages cannot be relocated where keys and values are stored as {arena.kv}; load the "
            "engine with kv='bf16', or pass image_kv='exact'."
        )


def _claim_rows(arena: KVArena, count: int) -> None:
    """Makes ``count`` blank rows part of the arena, to be written in any order."""
    layers, heads, _, dim = arena.k.shape
    blank = arena.k.new_zeros(()).expand(layers, heads, count, dim)
    arena.load(blank, blank)


def _move_in(
    model: Model, arena: KVArena, text: _Text, captured: Sequence[RelocatablePage]
) -> None:
    """Writes every captured page where ``text`` has it, its keys rotated to their true position."""
    for page, image in zip(captured, text.images, strict=True):
        cos, sin = model.decoder.rotary(text.positions[:, image].to(model.device))
        heads = page.k.to(model.device).flatten(0, 1).transpose(0, 1)  # [n, L * K, D]
        turned = apply_rotary(heads, cos.to(model.dtype), sin.to(model.dtype))
        rows = slice(text.held + int(image[0]), text.held + int(image[-1]) + 1)
        arena.k[:, :, rows] = turned.transpose(0, 1).unflatten(0, page.k.shape[:2])
        arena.v[:, :, rows].copy_(page.v, non_blocking=True)


def _question_mass(
    model: Model, arena: KVArena, text: _Text, question_ids: Sequence[int]
) -> Tensor:
    """How much the question attends to each token before the tail: [tail] fp32 on the CPU.

    The question stands where the tail will, so it looks at every page from its true distance. The
    words between the pages are computed in the same pass.
    """
    words = text.words[: text.tail].nonzero().flatten()
    embeds, positions = text.at(words)
    question = torch.tensor(list(question_ids), dtype=torch.int64)
    asked_at, _ = mrope_positions(question, [], model.spec, int(text.positions[0, text.tail]))
    end = text.held + text.tail
    probe = ProbePass(arena, text.held + words, end, len(question))
    embeds = torch.cat((embeds, embed_prompt(model, question, [])))
    _forward(model, probe.attend, embeds, torch.cat((positions, asked_at), dim=1))
    return probe.mass[text.held :].cpu()


def _most_attended(text: _Text, mass: Tensor, recompute: Recompute) -> Tensor:
    """The ``share`` of each page, without its first tokens, that has the largest ``mass``."""
    chosen = []
    for image in text.images:
        others = image[recompute.first_tokens :]
        best = mass[others].argsort(descending=True, stable=True)
        chosen.append(others[best[: round(recompute.share * len(others))]])
    return torch.cat(chosen)


def _forward(model: Model, attend: Attend, embeds: Tensor, positions: Tensor) -> Tensor:
    hidden: Tensor = model.decoder(embeds, positions.to(model.device), attend)
    return hidden
