"""Runs an exported engine on held-out questions and says how far it is from its original.

Per question the engine reads the prompt once and then the original's response in one piece, which
gives its logits at every position (teacher forcing). Its own greedy answer costs little more: as
long as those logits choose the token that stands there, that token is what it would have written
itself. From the first other choice on it decodes on its own, and proposes up to seven tokens of the
response per step where its last two tokens occur in it; a proposal counts only as far as the
engine's own choices confirm it. So the answer is the engine's greedy answer, for a fraction of the
steps. The only difference from decoding one token at a time is the number of rows a product has,
and with it the last bits of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmr5_export.agreement import (
    ORIGINAL,
    RankedSample,
    Ranking,
    RankMetrics,
    TokenMetrics,
    compare,
)
from mmr5_runtime.answer import parse_answer
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.image import preprocess
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.model import MAX_DECODE_TOKENS, decode_step, prefill
from mmr5_runtime.pages import DEFAULT_MAX_IMAGE_PIXELS, Page, open_page
from mmr5_runtime.planning import plan_context
from mmr5_runtime.prompt import Segments
from mmr5_runtime.rope import Grid
from mmr5_runtime.sampler import Sampler, SamplingParams
from mmr5_runtime.types import StopReason

_MATCHING = 2  # tokens that must agree before a proposal is made


@dataclass(frozen=True)
class Question:
    """A prompt ready to be read: its ids, and every page's patches [P, patch_dim] fp32 and grid."""

    token_ids: Sequence[int]
    pixels: Sequence[Tensor]
    grids: Sequence[Grid]
    max_new_tokens: int


def read_question(
    loaded: LoadedEngine, query: str, pages: Sequence[Page], max_new_tokens: int
) -> Question:
    """Opens, checks and resizes pages as ``Reranker.rerank`` does, with the same errors."""
    images = [
        open_page(page, max_image_pixels=DEFAULT_MAX_IMAGE_PIXELS, index=index)
        for index, page in enumerate(pages)
    ]
    plan = plan_context(
        loaded.tokenizer,
        loaded.engine.spec.vision,
        loaded.context,
        query,
        pages,
        [image.size for image in images],
        loaded.budget,
        max_new_tokens,
    )
    patched = [preprocess(image, loaded.budget, **loaded.image_settings) for image in images]
    return Question(
        plan.token_ids,
        [page.pixel_values for page in patched],
        [page.grid for page in patched],
        plan.max_new_tokens,
    )


def encode_pages(loaded: LoadedEngine, question: Question) -> list[Tensor]:
    """The engine's own embeddings [P / merge^2, hidden] of every page."""
    pages = zip(question.pixels, question.grids, strict=True)
    return [loaded.engine.encode_page(pixels, grid) for pixels, grid in pages]


@dataclass(frozen=True)
class Answer:
    """A greedy answer: ids including the end token if it came, text and what was read from it."""

    token_ids: tuple[int, ...]
    text: str
    ranking: Ranking
    stop_reason: StopReason


class Reading:
    """One engine that has read one prompt; answers and scores responses from there.

    ``embeddings`` are those of the pages, from :func:`encode_pages` of this engine or of one with
    the same vision tower. ``longest`` is the length of the longest response it will be given.
    """

    @torch.inference_mode()
    def __init__(
        self,
        loaded: LoadedEngine,
        question: Question,
        embeddings: Sequence[Tensor],
        longest: int = 0,
    ) -> None:
        self._loaded, self._question = loaded, question
        self._model = loaded.engine.model
        # As in a rerank, an answer ends where the context does.
        count = len(question.token_ids)
        self._limit = min(question.max_new_tokens, loaded.context - count)
        cursor = Cursor(loaded.engine, count + max(self._limit, longest) + MAX_DECODE_TOKENS)
        # Read in the segments of a rerank, whose last bits are then those of this reading.
        segments = Segments.cut(question.token_ids, loaded.engine.spec.image_token_id)
        cursor.read(segments.head)
        for ids, page, grid in zip(segments.pages, embeddings, question.grids, strict=True):
            cursor.read(ids, [page], [grid])
        self._first = cursor.logits(cursor.read(segments.tail))
        self._arena, self._position = cursor.arena, cursor.position

    @torch.inference_mode()
    def logits(self, response: Sequence[int]) -> Tensor:
        """fp32 logits [R, V] with which the engine predicts each of the R response tokens."""
        if not response:
            raise ValueError("an empty response has no predictions; give at least one token")
        self._arena.truncate(len(self._question.token_ids))
        rows = [self._first[None]]
        if given := response[:-1]:
            ids = torch.tensor(list(given), device=self._model.device)
            embeds = self._model.embed(ids)
            rows.append(prefill(self._model, embeds, self._after(0, len(given)), self._arena, True))
        return torch.cat(rows)

    def follow(self, response: Sequence[int]) -> tuple[Tensor, Answer]:
        """:meth:`logits` on ``response``, and the engine's own greedy answer."""
        logits = self.logits(response)
        return logits, self._finish(self._choose(response, logits))

    def answer(self) -> Answer:
        """The engine's greedy answer, decoded token by token."""
        self._arena.truncate(len(self._question.token_ids))
        return self._finish(self._choose((), self._first[None]))

    def _choose(self, response: Sequence[int], rows: Tensor) -> Iterator[int]:
        """Greedy tokens; ``rows`` are the logits along ``response``, already in the arena."""
        prompt, config = len(self._question.token_ids), self._loaded.generation_config
        sampler = Sampler(
            SamplingParams.from_generation_config(config, temperature=0.0, seed=0),
            self._question.token_ids,
            self._model.spec.text.vocab_size,
            self._model.device,
        )
        chosen: list[int] = []
        proposed = list(response)
        while True:
            for index, row in enumerate(rows):
                chosen.append(sampler.pick(row))
                yield chosen[-1]
                if proposed[index : index + 1] != chosen[-1:]:
                    break
            # What was read beyond the last confirmed token is forgotten; that token comes next.
            self._arena.truncate(prompt + len(chosen) - 1)
            proposed = _proposal(chosen, response)
            rows = self._step([chosen[-1], *proposed], len(chosen) - 1)

    def _finish(self, tokens: Iterator[int]) -> Answer:
        end, ids = self._model.spec.eos_token_ids, []
        stop: StopReason = "max_tokens"
        for token in tokens:
            ids.append(token)
            if token in end:
                stop = "eos"
                break
            if len(ids) >= self._limit:
                break
        text = self._loaded.tokenizer.decode(ids[:-1] if stop == "eos" else ids)
        parsed = parse_answer(text, len(self._question.grids))
        return Answer(tuple(ids), text, Ranking(parsed.order, parsed.status), stop)

    @torch.inference_mode()
    def _step(self, tokens: Sequence[int], offset: int) -> Tensor:
        positions = self._after(offset, len(tokens))[:1]
        return decode_step(self._model, torch.tensor([tokens]), positions, [self._arena])[0]

    def _after(self, offset: int, count: int) -> Tensor:
        start = self._position + offset
        return torch.arange(start, start + count).expand(3, -1)


def _proposal(chosen: Sequence[int], response: Sequence[int]) -> list[int]:
    """What follows the last tokens of ``chosen`` where they stand in ``response``.

    Of several places the one nearest to the same distance from the start: listwise reasoning
    repeats its phrases page by page.
    """
    last = list(chosen[-_MATCHING:])
    places = [
        end
        for end in range(_MATCHING, len(response))
        if list(response[end - _MATCHING : end]) == last
    ]
    if not places:
        return []
    place = min(places, key=lambda end: abs(end - len(chosen)))
    return list(response[place : place + MAX_DECODE_TOKENS - 1])


@dataclass(frozen=True)
class HeldOut:
    """One question with what the original made of it.

    ``response`` holds the original's R token ids, the end token included where it came;
    ``reference_logits`` is called once and returns its logits [R, V] along them. ``reference_by``
    is the format of the model that wrote ``response`` and ``reference``, which can be a copy of
    the original where that is too large to generate.
    """

    name: str
    question: Question
    response: Sequence[int]
    reference_logits: Callable[[], Tensor]
    reference: Ranking
    relevant: tuple[int, ...] | None = None
    reference_by: str = ORIGINAL


@dataclass(frozen=True)
class Evaluation:
    """What verification found on the held-out questions."""

    tokens: TokenMetrics
    ranks: RankMetrics


def evaluate_engine(
    loaded: LoadedEngine,
    samples: Iterable[HeldOut],
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Compares an engine with its original on every sample; one sample is in memory at a time.

    ``progress`` is called with the number of samples done. Raises :class:`VerificationFailed`
    naming a sample on which logits are not finite, ``ValueError`` without samples.
    """
    sums, ranked = [], []
    for sample in samples:
        response = list(sample.response)
        embeddings = encode_pages(loaded, sample.question)
        reading = Reading(loaded, sample.question, embeddings, longest=len(response))
        logits, answer = reading.follow(response)
        targets = torch.tensor(response)
        sums.append(compare(sample.reference_logits(), logits, targets, sample.name))
        ranked.append(
            RankedSample(sample.reference, answer.ranking, sample.relevant, sample.reference_by)
        )
        progress(len(sums))
    return Evaluation(TokenMetrics(tuple(sums)), RankMetrics(tuple(ranked)))
