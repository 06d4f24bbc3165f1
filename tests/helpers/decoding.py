"""The real decode loop over a scripted model, with what holds for every answer checked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from helpers.answer_streams import PAGE_COUNTS, random_text
from helpers.scripted import PROMPT, Said, Script, TokenCursor, mini_language
from mmr5_runtime.deadline import Deadline
from mmr5_runtime.decoding import Answer, Decoding
from mmr5_runtime.drafting import Drafter, SuffixIndex
from mmr5_runtime.language import Language
from mmr5_runtime.model import MAX_DECODE_TOKENS
from mmr5_runtime.options import RerankOptions
from mmr5_runtime.replies import Replay
from mmr5_runtime.sampler import Sampler, SamplingParams
from mmr5_runtime.timing import Timings

CPU = torch.device("cpu")
REASONING = "<think>Image 2 shows the rainfall, Image 1 does not.</think>"
Make = Callable[[], Language]


@dataclass
class Run:
    """One answer that was decoded to where it ended."""

    language: Language
    answer: Answer
    yielded: list[int]
    cursor: TokenCursor
    sampler: Sampler

    @property
    def interventions(self) -> int:
        return self.sampler.interventions

    @property
    def tokens(self) -> list[int]:
        return self.answer.tokens

    @property
    def text(self) -> str:
        data = b"".join(self.language.vocabulary[token] for token in self.tokens)
        return data.decode("utf-8", "replace")


def decode(
    script: Script,
    num_pages: int,
    limit: int = 300,
    deadline: Deadline | None = None,
    replay: Replay | None = None,
    history: SuffixIndex | None = None,
    **options: Any,
) -> Run:
    """Decode what ``script`` says; checks what holds for every answer.

    What can be is decoded twice, without and with passes launched ahead, and has to be the same.
    """
    asked = RerankOptions(**options)
    said = Said(script)
    again = copy(deadline)
    run = _decode(said, num_pages, limit, deadline, replay, history, asked, lookahead=False)
    if not asked.draft and (asked.seed is not None or not asked.temperature):
        ahead = _decode(said, num_pages, limit, again, replay, None, asked, lookahead=True)
        assert_same(ahead, run)
        return ahead
    return run


def _decode(
    said: Said,
    num_pages: int,
    limit: int,
    deadline: Deadline | None,
    replay: Replay | None,
    history: SuffixIndex | None,
    asked: RerankOptions,
    lookahead: bool,
) -> Run:
    language = said.language
    cursor = TokenCursor(said, limit + MAX_DECODE_TOKENS)
    params = SamplingParams(asked.temperature, seed=asked.seed if asked.temperature else 0)
    sampler = Sampler(params, PROMPT, len(language.vocabulary), CPU)
    ends = sorted(language.end_ids)
    drafter = Drafter(language.encode, ends, num_pages, history) if asked.draft else None
    decoding = Decoding(
        language,
        cursor,
        cursor.prompt_logits(),
        sampler,
        num_pages,
        asked,
        limit,
        Timings(CPU),
        deadline or Deadline(None),
        drafter,
        replay,
        lookahead,
    )
    yielded = list(decoding)
    answer = decoding.answer
    ended = answer.stop_reason == "eos"
    assert yielded == (answer.tokens[:-1] if ended else answer.tokens)
    assert not language.end_ids & set(yielded)
    # What a later request may take over lies in the arena: all tokens but the last.
    known = len(answer.tokens) - 1
    if replay is None or answer.replayed < len(answer.tokens):
        assert cursor.written[:known] == answer.tokens[:known]
    assert answer.accepted <= answer.drafted
    # A pass launched ahead is used or taken back, and none is launched that cannot be used.
    assert cursor.launched - cursor.steps <= lookahead
    if (answer.stop_reason, answer.reasoning_end) == ("max_tokens", "closed"):
        assert cursor.launched == cursor.steps
    return Run(language, answer, yielded, cursor, sampler)


def assert_same(one: Run, other: Run) -> None:
    """Whether two runs cannot be told apart by anything but the clock."""
    first, second = ({**vars(run.answer), "machine": None, "scores": None} for run in (one, other))
    assert first == second
    assert vars(one.answer.machine) == vars(other.answer.machine)
    # As text, since NaN is not equal to itself.
    assert str(one.answer.scores.logprobs) == str(other.answer.scores.logprobs)
    assert one.yielded == other.yielded
    assert one.cursor.mark == other.cursor.mark and one.cursor.steps == other.cursor.steps
    assert one.cursor.written == other.cursor.written
    assert _state(one.sampler) == _state(other.sampler)


def _state(sampler: Sampler) -> tuple[int, list[int], list[int]]:
    seen, generator = sampler._seen, sampler._generator
    return sampler.interventions, seen.nonzero().flatten().tolist(), generator.get_state().tolist()


def listing(ids: Sequence[int], reasoning: str = REASONING) -> str:
    return f"{reasoning}<answer>[{', '.join(map(str, ids))}]</answer>"


def shuffled(num_pages: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(1, num_pages + 1), num_pages)


def random_script(seed: int, make: Make = mini_language) -> tuple[int, Script]:
    """A page count and a model that writes a random answer for it, well formed or not."""
    rng = random.Random(seed)
    num_pages = rng.choice([count for count in PAGE_COUNTS if count > 1])
    text = random_text(rng, num_pages) or "x"
    script = Script.of(make(), text).but(endless=rng.random() < 0.15, seed=seed)
    return num_pages, script
