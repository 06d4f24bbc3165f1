"""Stop words: the tag as a tokenizer writes it, in the vocabulary of Qwen and in mini's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.scripted import mini_language, qwen_language
from mmr5_runtime.language import Language
from mmr5_runtime.trtllm.prompt import finished, written
from mmr5_runtime.trtllm.stops import STOP_TAG, StopWords
from mmr5_runtime.types import EngineError


def words_of(language: Language) -> StopWords:
    return StopWords.of(language.encode, language.vocabulary)


@pytest.mark.parametrize("language", [qwen_language(), mini_language()])
def test_every_word_holds_the_tag_and_begins_and_ends_with_it(language: Language) -> None:
    for word in words_of(language).words:
        pieces = [language.vocabulary[token] for token in word]
        text = b"".join(pieces).decode()
        assert STOP_TAG in text
        # Neither its first nor its last token is there for nothing.
        place = text.index(STOP_TAG)
        assert place < len(pieces[0]) and place + len(STOP_TAG) > len(text) - len(pieces[-1])


def test_the_tag_alone_never_stops_behind_a_list() -> None:
    """Why there are several words: Qwen's vocabulary has ``]</`` as one token."""
    language = qwen_language()
    ids, alone = language.encode("<answer>[2, 1]</answer>"), language.encode(STOP_TAG)
    assert ids[-len(alone) :] != alone
    assert words_of(language).at_end(ids)


@pytest.mark.parametrize("language", [qwen_language(), mini_language()])
@given(
    listing=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    gap=st.sampled_from(["", " ", "\n", ".", ","]),
    behind=st.sampled_from(["", "\n", "\n\n"]),
)
def test_answers_end_with_a_stop_word(
    language: Language, listing: list[int], gap: str, behind: str
) -> None:
    ids = language.encode(f"<think>so</think><answer>{listing}{gap}</answer>{behind}")
    words = words_of(language)
    assert words.at_end(ids) or any(words.at_end(ids[:end]) for end in range(1, len(ids)))


@pytest.mark.parametrize("language", [qwen_language(), mini_language()])
def test_texts_are_words_tokenized_alone(language: Language) -> None:
    found = words_of(language)
    assert {tuple(language.encode(text)) for text in found.texts} <= set(found.words)
    assert STOP_TAG in found.texts


def test_qwen_texts_know_the_bracket() -> None:
    assert "]</answer>" in words_of(qwen_language()).texts


def test_nested_for_one_request_with_other_end_tokens() -> None:
    found = StopWords(((1, 2), (3,)), ())
    assert found.nested((9,)) == [[[1, 2], [3], [9]]]


STOPS = StopWords(((7, 8),), ())


@pytest.mark.parametrize(
    ("tokens", "stops", "expected"),
    [
        ([1, 2, 99, 4], None, ([1, 2], True)),  # cut at the end token
        ([1, 2], None, ([1, 2], True)),  # fewer than allowed: the end token was left out
        ([1, 2, 3, 4], None, ([1, 2, 3, 4], False)),  # the limit
        ([1, 7, 8], STOPS, ([1, 7, 8], False)),  # a stop word
        ([1, 8, 7], STOPS, ([1, 8, 7], True)),
        ([], STOPS, ([], True)),
        ([7, 8, 99], STOPS, ([7, 8], True)),
    ],
)
def test_how_a_call_ended(
    tokens: list[int], stops: StopWords | None, expected: tuple[list[int], bool]
) -> None:
    assert written(tokens, frozenset({99}), 4, stops) == expected


@pytest.mark.parametrize(
    ("tokens", "reason", "stops", "expected"),
    [
        ([1, 2], "length", STOPS, ([1, 2], False)),  # short, and yet not at its end
        ([1, 2], "stop", STOPS, ([1, 2], True)),  # the end token, left out
        ([1, 2, 99], "stop", STOPS, ([1, 2], True)),
        ([1, 7, 8], "stop", STOPS, ([1, 7, 8], False)),
        ([1, 7, 8], "stop", None, ([1, 7, 8], True)),
    ],
)
def test_how_a_call_ended_that_says_so(
    tokens: list[int], reason: str, stops: StopWords | None, expected: tuple[list[int], bool]
) -> None:
    assert finished(tokens, reason, frozenset({99}), stops) == expected


@pytest.mark.parametrize("reason", ["cancelled", "timeout", None])
def test_a_call_that_was_given_up_is_no_answer(reason: str | None) -> None:
    with pytest.raises(EngineError, match="gave up"):
        finished([1, 2], reason, frozenset({99}), None)
