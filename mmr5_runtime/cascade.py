"""Two stages: every page judged by itself, then the relevant ones ranked together.

The scheme of MMRAG-RFT (arXiv 2512.17194): a pointwise pass drops what is irrelevant, a listwise
pass ranks the rest, and on request the same model answers from the pages ranked best. The prompts
are the profiles ``pointwise`` and ``mmrag``; a checkpoint that was not trained on them can be asked
all the same, which says nothing about how good its judgement is.

The pointwise prompts share their head, which is read once per group of them; pages and tails of a
group are read together, their linears over all rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence

import torch

from mmr5_runtime.cursor import Cursor
from mmr5_runtime.deadline import Deadline
from mmr5_runtime.decoding import Decoding
from mmr5_runtime.lists.plans import DEFAULT_WINDOW, single
from mmr5_runtime.model import embed_prompt, read_together
from mmr5_runtime.options import RerankOptions
from mmr5_runtime.planning import most_pages
from mmr5_runtime.prompt import PromptTokenizer, Segments
from mmr5_runtime.ranking import Record, run_plan
from mmr5_runtime.reading import read_prompt
from mmr5_runtime.request import Request
from mmr5_runtime.rope import mrope_positions
from mmr5_runtime.sampler import Sampler
from mmr5_runtime.types import ReasoningDelta

POINTWISE, ANSWERING = "pointwise", "mmrag"
RELEVANT = 0.5  # probability of "yes" from which on a page goes to the second stage
LEAST_KEPT = 2  # pages that go on however irrelevant they look
MOST_TOKENS = 8192  # of pages and tails read together
PAGES_ANSWERED_FROM = 3
_RESPONSE_OPEN, _RESPONSE_CLOSE = "<response>", "</response>"


def cascade(request: Request, record: Record) -> Generator[ReasoningDelta, None, tuple[int, ...]]:
    """Judge, rank and, if asked, answer; returns the order of all candidates.

    Pages that are dropped follow those that are ranked, by their relevance.
    """
    relevance = judge(request, record)
    record.relevance = tuple(relevance)
    record.rounds += 1
    # Pages that were not judged in time stand between the relevant and the others.
    chances = [RELEVANT if chance is None else chance for chance in relevance]
    by_relevance = sorted(range(len(chances)), key=lambda page: (-chances[page], page))
    kept = sorted(by_relevance[: _kept(request, chances)])
    order = yield from run_plan(request, single(len(kept), request.options.top_k), record, kept)
    if not record.outcomes[-1].completion_tokens:  # time was over: relevance is what is known
        order = tuple(page for page in by_relevance if page in kept)
    order = (*order, *(page for page in by_relevance if page not in kept))
    if request.options.answer:
        best = order[: request.options.top_k or PAGES_ANSWERED_FROM]
        record.answer = answer(request, best, record)
    return order


def _kept(request: Request, relevance: Sequence[float]) -> int:
    """How many pages go on: the relevant ones, as many as are wanted, and no more than fit."""
    options = request.options
    wanted = max(LEAST_KEPT, options.top_k or 0, sum(p >= RELEVANT for p in relevance))
    fits = most_pages(
        request.tokenizer,
        request.loaded.context,
        request.query,
        request.bank.planned,
        options.max_new_tokens,
    )
    return min(wanted, options.window or DEFAULT_WINDOW, fits, len(relevance))


@torch.inference_mode()
def judge(request: Request, record: Record) -> list[float | None]:
    """Probability of "yes" against "no" for every candidate, from its own prompt's first token.

    None for those that time was not left for.
    """
    tokenizer = request.loaded.profile(POINTWISE)
    yes, no = tokenizer.verdict_ids
    chances: list[float | None] = [None] * len(request.bank)
    for group in _groups(request, tokenizer):
        with request.turn():
            _judge_together(request, record, group, (yes, no), chances)
    return chances


def _judge_together(
    request: Request,
    record: Record,
    group: Sequence[tuple[int, Segments]],
    verdicts: tuple[int, int],
    chances: list[float | None],
) -> None:
    """Judge a group of candidates, as far as time allows; ``verdicts``: the ids of yes and no."""
    model = request.loaded.engine.model
    cursors: list[Cursor] = []
    embeds, positions = [], []
    for page, segments in group:
        if request.deadline.passed():
            record.late = True
            break
        cursor = Cursor(request.loaded.engine, len(segments.ids))
        cursor.read_head(segments.head, cursors[0] if cursors else None)
        ids = torch.tensor([*segments.pages[0], *segments.tail])
        prompt_page = request.bank.page(page)
        places, behind = mrope_positions(ids, [prompt_page.grid], model.spec, cursor.position)
        record.prompt_tokens += len(segments.ids)
        record.image_tokens += request.bank.planned[page].tokens
        request.counts.tokens_read += len(ids) + (0 if cursors else len(segments.head))
        embeds.append(embed_prompt(model, ids, [prompt_page.embeddings()]))
        positions.append(places)
        cursor.follow(behind, segments.tail[-1])
        cursors.append(cursor)
    if cursors:
        request.counts.page_prefills += len(cursors)
        with request.timings.span("judge"):
            arenas = [cursor.arena for cursor in cursors]
            logits = read_together(model, embeds, positions, arenas)
            tops = logits.amax(1).tolist()
            shares = logits[:, list(verdicts)].double().softmax(-1)[:, 0].tolist()
        for cursor, top in zip(cursors, tops, strict=True):
            if not math.isfinite(top):  # a NaN or an infinity is above any number
                raise cursor.not_finite(None)
        for (page, _), chance in zip(group, shares, strict=False):
            chances[page] = chance


def _groups(request: Request, tokenizer: PromptTokenizer) -> Iterator[list[tuple[int, Segments]]]:
    """Candidates with their prompts, as many at a time as are read together."""
    group: list[tuple[int, Segments]] = []
    tokens = 0
    for page, planned in enumerate(request.bank.planned):
        segments = tokenizer.segments(request.query, [planned.tokens])
        count = len(segments.pages[0]) + len(segments.tail)
        if group and tokens + count > MOST_TOKENS:
            yield group
            group, tokens = [], 0
        group.append((page, segments))
        tokens += count
    yield group


def answer(request: Request, pages: Sequence[int], record: Record) -> str:
    """What the model answers to the question itself when it is shown ``pages``.

    Only the first of them where the context does not hold all; empty where it holds none. What
    there is of it when the deadline passes; ``record`` then says that it was late.
    """
    tokenizer, memory = request.loaded.profile(ANSWERING), request.memory
    planned = [request.bank.planned[page] for page in pages]
    context, reply = request.loaded.context, request.options.max_new_tokens
    pages = pages[: most_pages(tokenizer, context, request.query, planned, reply)]
    if not pages:
        return ""
    plan = request.plan_prompt(pages, tokenizer)
    prompt = request.prompt(plan, pages, tokenizer)
    spec, device = request.loaded.engine.spec, request.loaded.engine.device
    capacity = len(plan.token_ids) + plan.max_new_tokens
    cursor = Cursor(request.loaded.engine, capacity, request.seat)
    logits = read_prompt(
        prompt,
        prompt.keys(),
        cursor,
        memory.segments,
        memory.ledger,
        request.counts,
        request.timings,
        request.deadline,
        request.turn,
    )
    record.prompt_tokens += len(plan.token_ids)
    record.image_tokens += sum(request.bank.planned[index].tokens for index in pages)
    if logits is None:
        record.late = True
        return ""
    decoding = Decoding(
        request.loaded.language,
        cursor,
        logits,
        Sampler(request.params, plan.token_ids, spec.text.vocab_size, device),
        len(pages),
        RerankOptions(stop="eos", constrain=False),
        plan.max_new_tokens,
        request.timings,
        Deadline(None),  # nothing is forced into this text: it is cut below
    )
    tokens = []
    for token in decoding:
        tokens.append(token)
        if request.deadline.passed():
            record.late = True
            break
    record.other_tokens += len(tokens)
    text = tokenizer.decode(tokens)
    # The last one, as the reasoning may quote the tag; everything if the model used none.
    return text.rpartition(_RESPONSE_OPEN)[2].partition(_RESPONSE_CLOSE)[0].strip()
