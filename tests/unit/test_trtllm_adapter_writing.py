"""An answer made of whole calls ends where one decoded step by step ends."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from helpers.answer_streams import PAGE_COUNTS, random_text
from helpers.decoding import decode
from helpers.scripted import Said, Script, mini_language, qwen_language
from mmr5_runtime.options import RerankOptions
from mmr5_runtime.trtllm.prompt import Written, written
from mmr5_runtime.trtllm.stops import StopWords
from mmr5_runtime.trtllm.writing import Room, Writing
from mmr5_runtime.types import EngineError

LIMIT = 150
AMPLE = Room(LIMIT, 10_000, 10_000)
STOPS = {
    language: StopWords.of(language.encode, language.vocabulary)
    for language in (qwen_language(), mini_language())
}


class Caller:
    """Runs calls as a runner does: greedily, up to a stop word, an end token or the limit."""

    def __init__(self, script: Script, stops: StopWords | None, ends_shown: bool = True) -> None:
        self.said, self.stops, self.ends_shown = Said(script), stops, ends_shown
        self.calls: list[tuple[int, int]] = []  # tokens behind the prompt, limit

    def __call__(self, behind: Sequence[int], limit: int) -> Written:
        assert limit > 0
        self.calls.append((len(behind), limit))
        ends, tokens = self.said.language.end_ids, list[int]()
        while len(tokens) < limit and not (self.stops and self.stops.at_end(tokens)):
            token = int(self.said.logits([*behind, *tokens]).argmax())
            if token not in ends or self.ends_shown:
                tokens.append(token)
            if token in ends:
                break
        return written(tokens, ends, limit, self.stops)


def write(
    script: Script, num_pages: int, room: Room = AMPLE, ends_shown: bool = True, **options: Any
) -> tuple[Writing, Caller]:
    asked = RerankOptions(**options)
    stops = None if asked.stop == "eos" else STOPS[script.language]
    caller = Caller(script, stops, ends_shown)
    writing = Writing(caller, script.language, num_pages, asked, room)
    writing.run()
    return writing, caller


@pytest.mark.parametrize("stop", ["eos", "tag"])
@pytest.mark.parametrize("language", [qwen_language(), mini_language()], ids=["qwen", "mini"])
def test_answers_end_as_they_do_step_by_step(language: Any, stop: str) -> None:
    rng = random.Random(f"{stop} calls")
    for case in range(40):
        pages = rng.choice([count for count in PAGE_COUNTS if count > 1])
        script = Script.of(language, random_text(rng, pages)).but(seed=case)
        options: dict[str, Any] = {
            "stop": stop,
            "constrain": False,
            "think": rng.choice(["full", "off", 1, 4, 9]),
        }
        limit = rng.choice([3, 12, LIMIT])
        stepped = decode(script, pages, limit, **options)
        room = Room(limit, 10_000, 10_000)
        called, _ = write(script, pages, room, ends_shown=rng.random() < 0.5, **options)
        ours, theirs = called.answer, stepped.answer
        assert ours.tokens == theirs.tokens, (case, options)
        assert ours.machine.ids == theirs.machine.ids
        assert ours.stop_reason == theirs.stop_reason
        assert ours.reasoning_end == theirs.reasoning_end


def test_masked_says_whether_the_mask_would_have_changed_anything() -> None:
    rng, seen = random.Random("mask"), set[bool]()
    for case in range(60):
        pages = rng.choice([2, 3, 5, 11])
        script = Script.of(qwen_language(), random_text(rng, pages)).but(seed=case)
        masked = decode(script, pages, LIMIT, stop="tag", constrain=True)
        called, _ = write(script, pages, stop="tag")
        assert called.masked == (masked.interventions == 0), case
        if called.masked:
            assert called.answer.tokens == masked.tokens
        seen.add(called.masked)
    assert seen == {True, False}


PLAIN = "<think>Image 2 fits.</think><answer>[2, 1, 3]</answer>"


def test_a_quoted_tag_ends_a_call_and_not_the_answer() -> None:
    text = "<think>It ends with </answer> in form.</think><answer>[2, 1, 3]</answer>"
    called, caller = write(Script.of(qwen_language(), text), 3, stop="tag")
    assert len(caller.calls) == 2
    assert called.answer.machine.ids == (2, 1, 3) and called.answer.stop_reason == "tag"


def test_determined_ends_at_the_tag_and_says_so() -> None:
    script = Script.of(qwen_language(), PLAIN)
    called, _ = write(script, 3, stop="determined")
    assert called.answer.stop_reason == "tag"
    early = decode(script, 3, LIMIT, stop="determined")
    assert early.answer.stop_reason == "determined"
    assert called.answer.machine.ids[:2] == early.answer.machine.ids


def test_a_tag_that_no_stop_word_is_met_by_is_cut_afterwards() -> None:
    script = Script.of(qwen_language(), PLAIN + " and so on")
    caller = Caller(script, None)
    options = RerankOptions(stop="tag")
    writing = Writing(caller, qwen_language(), 3, options, AMPLE)
    writing.run()
    text = b"".join(qwen_language().vocabulary[token] for token in writing.tokens).decode()
    assert text == PLAIN and writing.answer.stop_reason == "tag"
    assert writing.decoded > len(writing.tokens)


def test_a_budget_is_one_call_of_so_many_tokens_and_another_behind_the_forced_end() -> None:
    script = Script.of(qwen_language(), PLAIN)
    called, caller = write(script, 3, stop="tag", think=2)
    forced = len(qwen_language().encode("</think><answer>["))
    assert caller.calls == [(0, 2), (2 + forced, LIMIT - 2)]
    assert called.answer.reasoning_end == "budget"


def test_no_reasoning_is_part_of_what_the_first_call_reads() -> None:
    called, caller = write(Script.of(qwen_language(), PLAIN), 3, stop="tag", think="off")
    forced = qwen_language().encode("<think></think><answer>[")
    assert caller.calls == [(len(forced), LIMIT)]
    assert called.tokens[: len(forced)] == forced


def test_an_answer_stops_where_the_engine_has_no_more_room() -> None:
    script = Script.of(qwen_language(), PLAIN)
    called, _ = write(script, 3, Room(LIMIT, 10_000, 4), stop="tag")
    assert (called.answer.stop_reason, len(called.tokens)) == ("max_tokens", 4)
    quoted = Script.of(qwen_language(), "<think> </answer> </think><answer>[2, 1, 3]</answer>")
    called, caller = write(quoted, 3, Room(LIMIT, 1, 10_000), stop="tag")
    assert called.answer.stop_reason == "max_tokens" and len(caller.calls) == 1


def test_a_runner_that_writes_nothing_is_an_error() -> None:
    options = RerankOptions(stop="tag")
    writing = Writing(lambda *_: Written([], False), mini_language(), 3, options, AMPLE)
    with pytest.raises(EngineError, match="wrote nothing"):
        writing.run()
