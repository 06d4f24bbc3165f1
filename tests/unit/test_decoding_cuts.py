"""The decode loop where others cut in: no reasoning, a budget, no time left, an earlier answer."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.decoding import CPU, REASONING, Make, decode, listing, random_script, shuffled
from helpers.scripted import (
    PROMPT,
    Script,
    StepDeadline,
    TokenCursor,
    mini_language,
    qwen_language,
)
from mmr5_runtime.drafting import SuffixIndex
from mmr5_runtime.replies import Replies
from mmr5_runtime.reuse.segments import SegmentStore
from mmr5_runtime.types import EngineError

LANGUAGES = pytest.mark.parametrize("make", [qwen_language, mini_language], ids=["qwen", "mini"])


# Reasoning that is left out or cut


@pytest.mark.parametrize("draft", [False, True])
@LANGUAGES
def test_a_budget_closes_the_reasoning_at_exactly_that_many_tokens(make: Make, draft: bool) -> None:
    language = make()
    script = Script.of(language, listing([3, 1, 2]))
    reasoning = len(language.encode(REASONING.removesuffix("</think>")))
    history = SuffixIndex()
    history.add(script.tokens)
    for budget in range(1, reasoning + 1):
        run = decode(script, 3, stop="tag", think=budget, draft=draft, history=history)
        assert run.answer.reasoning_end == "budget"
        assert run.tokens[:budget] == list(script.tokens[:budget])
        kept = b"".join(language.vocabulary[token] for token in script.tokens[:budget]).decode()
        # The script's own list follows; a tag that the model had begun is completed.
        assert run.text == listing([3, 1, 2], kept.removesuffix("</") + "</think>")
        assert run.answer.stop_reason == "tag" and run.interventions == 0
    enough = decode(script, 3, stop="tag", think=len(script.tokens), draft=draft)
    assert enough.answer.reasoning_end == "closed" and enough.tokens == list(script.tokens)


@LANGUAGES
def test_a_budget_completes_a_tag_that_has_begun(make: Make) -> None:
    language = make()
    for begun in ("<", "</", "</t", "</th", "</thi", "</thin", "</think"):
        text = "<think>Hm" + begun
        tokens = tuple(language.encode(text))
        script = Script(language, (*tokens, *language.encode("and on and on")))
        run = decode(script, 3, think=len(tokens))
        assert run.text.startswith("<think>Hm</think><answer>["), begun
        assert run.answer.machine.state == "list"


def test_a_budget_ends_a_reasoning_that_quotes_an_answer() -> None:
    text = "<think>Maybe <answer>[1, 2]</answer>? " + "No. " * 20
    run = decode(Script.of(qwen_language(), text), 3, think=15)
    assert (run.answer.stop_reason, run.answer.reasoning_end) == ("max_tokens", "budget")
    assert len(run.tokens) == 15  # a list forced behind the quoted one would not be read


@LANGUAGES
@pytest.mark.parametrize("num_pages", [2, 3, 12, 110])
def test_think_off_begins_with_the_list(make: Make, num_pages: int) -> None:
    ids = shuffled(num_pages, 1)
    run = decode(Script.of(make(), listing(ids)), num_pages, limit=600, think="off", stop="tag")
    assert run.text == listing(ids, "<think></think>")
    assert run.answer.reasoning_end == "skipped" and run.interventions == 0


@LANGUAGES
@pytest.mark.parametrize("num_pages", [2, 3, 12, 110])
def test_think_auto_reasons_where_the_first_choice_is_unclear(make: Make, num_pages: int) -> None:
    ids = shuffled(num_pages, 2)
    sure = Script.of(make(), listing(ids))
    answers = [
        decode(script, num_pages, limit=600, think=think, stop="eos")
        for script, think in ((sure, "off"), (sure, "auto"), (sure, "full"))
    ]
    off, clear, full = answers
    assert clear.tokens == off.tokens and clear.answer.reasoning_end == "skipped"
    unclear = decode(sure.but(unsure=True), num_pages, limit=600, think="auto", stop="eos")
    assert unclear.answer.steps == full.answer.steps
    assert unclear.answer.reasoning_end == "closed"
    never = decode(sure, num_pages, limit=600, think="auto", think_margin=0.0, stop="eos")
    assert never.tokens == off.tokens


@pytest.mark.parametrize("think", ["off", "auto", 1])
@pytest.mark.parametrize("num_pages", [3, 110])
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_forced_text_fits_behind_the_shortest_limit(
    think: str | int, num_pages: int, limit: int
) -> None:
    """The arena has room for it; the prompt's own is the caller's, see ``WindowRun``."""
    for make in (qwen_language, mini_language):
        script = Script.of(make(), listing(shuffled(num_pages, 3)))
        run = decode(script, num_pages, limit, think=think)
        assert run.answer.stop_reason in ("max_tokens", "determined")


# Time


@pytest.mark.parametrize("num_pages", [3, 12])
def test_a_deadline_before_the_list_ranks_by_the_first_choice(num_pages: int) -> None:
    ids = shuffled(num_pages, 7)
    script = Script.of(qwen_language(), listing(ids))
    opened = len(qwen_language().encode(REASONING + "<answer>")) - 1
    for steps in range(opened):
        run = decode(script, num_pages, deadline=StepDeadline(steps), draft=steps % 2 == 1)
        answer = run.answer
        assert answer.stop_reason == answer.reasoning_end == "deadline"
        assert answer.known is not None and sorted(answer.known) == list(range(1, num_pages + 1))
        assert answer.known[0] == ids[0]
        assert run.text.count("</think>") == 1 and run.text.endswith("<answer>[")
        assert answer.scores.logprobs == ()


@dataclass(frozen=True)
class Damaged(Script):
    """Has a NaN, or an infinity, among its logits behind text that ends with ``behind``."""

    behind: str = "<answer>["
    number: float = math.nan

    def logits(self, written: Sequence[int]) -> Tensor:
        row = super().logits(written)
        text = b"".join(self.language.vocabulary[token] for token in written)
        if text.endswith(self.behind.encode()):
            row[5] = self.number
        return row


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("options", "steps", "behind"),
    [
        ({"think": "auto"}, None, "<answer>["),
        ({"think": "auto"}, None, "<answer>[1"),
        ({}, 3, "<answer>["),
        ({}, 3, "<answer>[1"),
    ],
)
def test_a_first_choice_among_no_numbers_is_an_error(
    options: dict[str, Any],
    steps: int | None,
    behind: str,
    number: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def not_finite(cursor: TokenCursor, token: int | None) -> EngineError:
        assert token == cursor.written[-1]
        return EngineError("the logits are not finite")

    monkeypatch.setattr(TokenCursor, "not_finite", not_finite)
    language = mini_language()
    tokens = tuple(language.encode(listing(shuffled(12, 3))))
    script = Damaged(language, tokens, behind=behind, number=number)
    deadline = None if steps is None else StepDeadline(steps)
    with pytest.raises(EngineError, match="not finite"):
        decode(script, 12, deadline=deadline, **options)


def test_a_deadline_in_the_list_keeps_what_was_named() -> None:
    ids = shuffled(9, 8)
    script = Script.of(mini_language(), listing(ids))
    named = set()
    for steps in range(len(script.tokens)):
        run = decode(script, 9, stop="eos", deadline=StepDeadline(steps))
        answer = run.answer
        assert answer.stop_reason == "deadline"
        assert len(run.tokens) <= max(steps, 1) + len("</think><answer>[")
        if answer.known is None:
            assert answer.machine.ids == tuple(ids[: len(answer.machine.ids)])
            assert answer.reasoning_end == "closed"
            named.add(len(answer.machine.ids))
    assert named == set(range(1, 10))
    late = decode(script, 9, stop="eos", deadline=StepDeadline(len(script.tokens) + 3))
    assert late.answer.stop_reason == "eos"


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), steps=st.integers(0, 60))
def test_a_deadline_always_ends_the_answer(seed: int, steps: int) -> None:
    num_pages, script = random_script(seed)
    think = random.Random(seed).choice(["full", "off", "auto", 4])
    run = decode(script, num_pages, 400, StepDeadline(steps), think=think, draft=seed % 2 == 0)
    # A draft's tokens are one step; without it a step is a token.
    assert run.cursor.steps <= steps + 8
    if run.answer.known is not None:
        assert sorted(run.answer.known) == list(range(1, num_pages + 1))


# Going on with an answer that was given before


@LANGUAGES
@pytest.mark.parametrize("draft", [False, True])
def test_a_continued_answer_is_the_one_decoded_at_once(make: Make, draft: bool) -> None:
    num_pages = 12
    script = Script.of(make(), listing([2, 2, 11, 1, 12, 3, 10]) + " so").but(certainty=4.0)
    store = SegmentStore(1 << 24, CPU)
    nothing = torch.zeros(1, 1, 1, 4)
    assert store.insert(b"page", None, nothing, nothing, 1.0)
    replies = Replies(store, b"prompt", b"page", "test")
    at_once = decode(script, num_pages, stop="eos", draft=draft)
    steps_made = 0
    for options in (
        {"top_k": 1},
        {"top_k": 1},
        {"top_k": 3},
        {"limit": 45},
        {},
        {"stop": "tag"},
        {"stop": "eos"},
        {"stop": "eos"},
        {"top_k": 2},
    ):
        replay = replies.recall()
        run = decode(script, num_pages, draft=draft, replay=replay, **options)
        fresh = decode(script, num_pages, draft=draft, **options)
        assert run.answer.steps == fresh.answer.steps == at_once.answer.steps[: len(run.tokens)]
        assert run.answer.stop_reason == fresh.answer.stop_reason
        assert run.answer.scores.logprobs == fresh.answer.scores.logprobs
        assert run.interventions == fresh.interventions
        assert run.answer.machine.ids == fresh.answer.machine.ids
        assert run.answer.replayed == min(len(replay.steps) if replay else 0, len(run.tokens))
        steps_made += run.cursor.steps
        prompt = run.cursor.mark._replace(length=len(PROMPT))
        replies.remember(run.answer.steps, run.cursor, prompt, 1.0)
    if not draft:
        # Every token was decoded once, and one behind each of the continued answers read again.
        assert steps_made <= len(at_once.tokens) + 5
