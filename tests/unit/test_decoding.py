"""The decode loop on output of every kind: stops, mask and drafts."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.decoding import REASONING, Make, Run, decode, listing, random_script, shuffled
from helpers.scripted import Script, mini_language, qwen_language
from mmr5_runtime.answer import order_of, parse_answer
from mmr5_runtime.drafting import SuffixIndex
from mmr5_runtime.stopping.machine import AnswerMachine

LANGUAGES = pytest.mark.parametrize("make", [qwen_language, mini_language], ids=["qwen", "mini"])


# Where an answer stops


@LANGUAGES
@pytest.mark.parametrize("num_pages", [2, 5, 9, 10, 12, 23])
def test_a_valid_answer_is_written_as_it_would_have_been(make: Make, num_pages: int) -> None:
    ids = shuffled(num_pages, num_pages)
    script = Script.of(make(), listing(ids))
    whole = decode(script, num_pages, stop="eos", constrain=False)
    assert whole.tokens[:-1] == list(script.tokens) and whole.answer.stop_reason == "eos"
    masked = decode(script, num_pages, stop="eos")
    assert masked.tokens == whole.tokens and masked.interventions == 0
    assert masked.answer.machine.ids == tuple(ids)
    assert masked.answer.reasoning_end == "closed"
    tag = decode(script, num_pages, stop="tag")
    assert tag.tokens == whole.tokens[:-1] and tag.answer.stop_reason == "tag"
    stopped = decode(script, num_pages)
    assert stopped.answer.stop_reason == "determined"
    assert len(stopped.tokens) < len(tag.tokens)
    assert len(stopped.answer.machine.ids) >= num_pages - 1
    for top_k in range(1, num_pages - 1):
        best = decode(script, num_pages, top_k=top_k)
        assert best.answer.stop_reason == "top_k"
        assert best.answer.machine.ids == tuple(ids[:top_k])
        assert best.tokens == whole.tokens[: len(best.tokens)]


def test_random_answers_stop_as_early_as_is_safe_and_no_earlier() -> None:
    """Against the answer decoded to its end, token by token through a machine of its own."""
    for seed in range(60):
        draft = seed % 2 == 0
        num_pages, script = random_script(seed)
        constrain = seed % 3 != 0
        whole = decode(script, num_pages, 150, stop="eos", constrain=constrain)
        wanted = min(1 + seed % 4, num_pages)
        for top_k in (None, wanted):
            options: dict[str, Any] = {"top_k": top_k, "constrain": constrain, "draft": draft}
            stopped = decode(script, num_pages, 150, **options)
            assert stopped.tokens == whole.tokens[: len(stopped.tokens)], seed
            if top_k is None and stopped.answer.machine.ids:
                assert _order(stopped, num_pages) == _order(whole, num_pages), seed
            elif stopped.answer.stop_reason == "top_k":
                assert _order(stopped, num_pages)[:wanted] == _order(whole, num_pages)[:wanted]
            machine = AnswerMachine(num_pages, constrained=constrain)
            enough = num_pages if top_k is None else top_k
            known = [False]
            for token in whole.tokens:
                machine.feed(script.language.vocabulary[token])
                done = machine.determined or len(machine.ids) >= enough
                known.append(done and bool(machine.ids))
            if any(known):
                assert stopped.answer.stop_reason in ("determined", "top_k"), seed
                assert len(stopped.tokens) == known.index(True), seed
            else:
                assert stopped.tokens == whole.tokens, seed
                assert stopped.answer.stop_reason == whole.answer.stop_reason


def _order(run: Run, num_pages: int) -> tuple[int, ...]:
    ids = run.answer.machine.ids
    return order_of(ids, num_pages) if ids else parse_answer(run.text, num_pages).order


@pytest.mark.parametrize("stop", ["tag", "determined"])
def test_a_quoted_answer_stops_nothing(stop: str) -> None:
    text = "<think>I could say <answer>[3, 1, 2]</answer> but</think><answer>[1, 2, 3]</answer>"
    script = Script.of(qwen_language(), text)
    run = decode(script, 3, stop=stop, top_k=1)
    assert run.answer.stop_reason == "eos" and run.text == text
    assert run.answer.machine.ids == ()


def test_an_answer_that_ends_early_is_not_known_without_an_id() -> None:
    script = Script.of(qwen_language(), REASONING + "<answer>[]</answer> or rather <answer>[2]")
    run = decode(script, 3, constrain=False)
    assert run.answer.stop_reason == "eos" and run.answer.machine.ids == ()
    tag = decode(script, 3, stop="tag", constrain=False)
    assert tag.text == run.text and tag.answer.stop_reason == "eos"


@pytest.mark.parametrize("limit", [1, 2, 9, 40])
@pytest.mark.parametrize("draft", [False, True])
def test_the_limit_is_kept_by_a_model_that_never_ends(limit: int, draft: bool) -> None:
    for text in ("<think>and so on", listing([1, 1, 1]), "<think></think><answer>["):
        script = Script.of(mini_language(), text).but(endless=True)
        for stop in ("eos", "tag", "determined"):
            run = decode(script, 4, limit, stop=stop, constrain=False, draft=draft)
            assert run.answer.stop_reason in ("max_tokens", "determined", "tag")
            assert len(run.tokens) <= limit
            if run.answer.stop_reason == "max_tokens":
                assert len(run.tokens) == limit


# The mask


@LANGUAGES
def test_invalid_lists_are_kept_valid_and_every_change_is_counted(make: Make) -> None:
    for written, num_pages in (
        ("[2, 2, 2, 2, 2]</answer>", 4),
        ("[7, 8, 9]</answer>", 5),
        ("[Image 2, Image 1]</answer>", 3),
        ("[1, 11, 12, 13, 1, 1]</answer>", 12),
    ):
        script = Script.of(make(), REASONING + "<answer>" + written)
        run = decode(script, num_pages, stop="eos")
        pieces = run.text.partition("<answer>[")[2].partition("]")[0].split(",")
        numbers = tuple(int(piece) for piece in pieces)
        assert run.answer.machine.ids == tuple(dict.fromkeys(numbers)) == numbers, written
        assert set(numbers) <= set(range(1, num_pages + 1)), written
        assert run.interventions == _changed(run, script, num_pages) > 0, written
        assert sum(step.intervened for step in run.answer.steps) == run.interventions


def test_a_token_that_opens_two_lists_is_survived() -> None:
    """`[[` is one token, so the mask comes too late for its second bracket."""
    script = Script.of(qwen_language(), REASONING + "<answer>[[3, 3, 1], [2]]</answer>")
    run = decode(script, 4, stop="eos")
    assert run.text.startswith(REASONING + "<answer>[[3, ") and run.interventions > 0
    machine = run.answer.machine
    assert machine.ids[0] == 3 and machine.repaired


def test_a_list_may_be_closed_early() -> None:
    script = Script.of(qwen_language(), listing([3, 1]))
    run = decode(script, 4)
    assert run.answer.stop_reason == "determined" and run.interventions == 0
    assert run.answer.machine.ids == (3, 1)
    # Nothing behind the bracket can matter, so nothing behind its token is waited for.
    assert run.text.endswith("[3, 1]</")


def _changed(run: Run, script: Script, num_pages: int) -> int:
    """Tokens of the list that the model did not want."""
    machine = AnswerMachine(num_pages, constrained=True)
    changed = 0
    for place, token in enumerate(run.tokens):
        unwanted = script.wants(run.tokens[:place]) != token
        assert not (unwanted and machine.state != "list")
        changed += unwanted
        machine.feed(script.language.vocabulary[token])
    return changed


def test_log_probabilities_come_with_the_ids() -> None:
    ids = shuffled(12, 5)
    script = Script.of(qwen_language(), listing(ids)).but(certainty=5.0)
    run = decode(script, 12, stop="eos")
    assert run.answer.machine.ids == tuple(ids)
    assert len(run.answer.scores.logprobs) == len(run.answer.machine.ids) == 12
    assert all(number <= 0 for number in run.answer.scores.logprobs)
    assert run.answer.scores.logprobs[-1] == pytest.approx(0.0)  # nothing else was left
    assert min(run.answer.scores.logprobs) < -0.05


# Drafts


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.0, 0.7]))
def test_drafts_change_nothing(seed: int, temperature: float) -> None:
    num_pages, script = random_script(seed)
    # A model that hesitates rejects drafts half way; a sure one takes whole ones.
    script = script.but(certainty=3.0 if seed % 2 else 20.0)
    rng = random.Random(seed)
    options: dict[str, Any] = {
        "temperature": temperature,
        "seed": seed,
        "constrain": rng.random() < 0.7,
        "stop": rng.choice(["eos", "tag", "determined"]),
        "think": rng.choice(["full", "full", "off", "auto", 5]),
        "top_k": rng.choice([None, 1, 3]),
    }
    plain = decode(script, num_pages, 120, **options)
    history = SuffixIndex()
    for _ in range(2):  # with nothing and with the same answer to draft from
        drafted = decode(script, num_pages, 120, history=history, draft=True, **options)
        assert drafted.answer.steps == plain.answer.steps
        assert drafted.answer.stop_reason == plain.answer.stop_reason
        assert drafted.answer.reasoning_end == plain.answer.reasoning_end
        assert drafted.interventions == plain.interventions
        assert drafted.answer.scores.logprobs == pytest.approx(
            plain.answer.scores.logprobs, nan_ok=True
        )
        history.add(drafted.tokens)


def test_drafts_save_passes() -> None:
    script = Script.of(qwen_language(), listing([4, 1, 2, 3, 5, 6, 7, 8, 9]))
    plain = decode(script, 9, stop="eos")
    history = SuffixIndex()
    history.add(plain.tokens)
    drafted = decode(script, 9, stop="eos", draft=True, history=history)
    assert plain.cursor.steps == len(plain.tokens) - 1
    assert drafted.tokens == plain.tokens
    assert drafted.cursor.steps < plain.cursor.steps / 3
