"""The real decode loop over a scripted model, with what holds for every answer checked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from helpers.answer_streams import PAGE_COUNTS, random_text
from helpers.scripted import PROMPT, Script, TokenCursor, mini_language
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
    interventions: int

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
    """Decode what ``script`` says; checks what holds for every answer."""
    asked, language = RerankOptions(**options), script.language
    cursor = TokenCursor(script, limit + MAX_DECODE_TOKENS)
    params = SamplingParams(asked.temperature, seed=asked.seed)
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
    return Run(language, answer, yielded, cursor, sampler.interventions)


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
