"""Stop words: every way in which a tokenizer writes ``</answer>``.

TensorRT-LLM compares the last tokens with the words it was given, and its LLM API makes one word of
every string by tokenizing it alone. Neither knows that the tag seldom stands alone: in Qwen's
vocabulary ``]</`` and ``>\\n`` are single tokens, so ``stop=["</answer>"]`` is never met behind the
bracket of a list. The words here are those of the tag in its usual company. A tag written otherwise
does not stop the generation, and is found in the text afterwards.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

STOP_TAG = "</answer>"
_BEFORE = ("", *string.punctuation, " ", "\n")
_BEHIND = ("", "\n", "\n\n", "<")


@dataclass(frozen=True)
class StopWords:
    """``words``: token ids of each; ``texts``: those words that are some text tokenized alone."""

    words: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]

    @classmethod
    def of(
        cls, encode: Callable[[str], list[int]], vocabulary: Sequence[bytes], tag: str = STOP_TAG
    ) -> StopWords:
        """The words of ``tag``; ``vocabulary[id]`` are the bytes that a token adds to the text."""
        words = {
            _covering(encode(before + tag + behind), vocabulary, len(before), len(tag))
            for before in _BEFORE
            for behind in _BEHIND
        }
        ordered = tuple(sorted(words, key=lambda word: (len(word), word)))
        texts = (_text(word, vocabulary) for word in ordered)
        alone = tuple(
            text
            for text, word in zip(texts, ordered, strict=True)
            if text is not None and tuple(encode(text)) == word
        )
        return cls(ordered, alone)

    def at_end(self, tokens: Sequence[int]) -> bool:
        """Whether ``tokens`` end with one of the words."""
        return any(tuple(tokens[-len(word) :]) == word for word in self.words)

    def nested(self, end_ids: Sequence[int] = ()) -> list[list[list[int]]]:
        """For one request: a list of requests, each a list of words, each a list of ids.

        ``end_ids`` are end tokens to stop at besides the one that an engine takes by itself.
        """
        return [[*(list(word) for word in self.words), *([token] for token in end_ids)]]


def _covering(
    ids: Sequence[int], vocabulary: Sequence[bytes], start: int, length: int
) -> tuple[int, ...]:
    """Those of ``ids`` that hold a byte of the text from ``start`` on, ``length`` bytes long."""
    covering, place = [], 0
    for token in ids:
        size = len(vocabulary[token])
        if place < start + length and place + size > start:
            covering.append(token)
        place += size
    return tuple(covering)


def _text(word: Sequence[int], vocabulary: Sequence[bytes]) -> str | None:
    try:
        return b"".join(vocabulary[token] for token in word).decode()
    except UnicodeDecodeError:
        return None
