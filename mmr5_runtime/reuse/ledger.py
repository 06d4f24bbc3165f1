"""Why something had to be computed again: the reason behind every cache miss.

A hit rate alone does not tell whether a cache is too small, or whether the requests differ in what
must not differ. The ledger remembers digests of what earlier requests looked like and names, for
each miss, the first thing that was not as before:

``evicted``     this very thing was computed before and is not kept any more, or never found room
``count``       the question is known, but with another number of pages, which stands in the prompt
``query``       the prompt's head is new: a new question, or the first one
``order``       the page was read behind this head, but behind other pages than now
``parameters``  the page's pixels are known, but were resized or encoded in another way
``page``        the page itself is new
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from mmr5_runtime.reuse.chain import REMEMBERED_KEYS, RecentKeys

Reason = Literal["query", "count", "order", "page", "parameters", "evicted"]
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass(frozen=True)
class PromptKeys:
    """What names one prompt and its parts; every ``bytes`` is a 32-byte digest.

    ``root`` is what the chain of keys begins with and ``question`` the digest of the question's
    text; ``head`` is the key of the head's segment. ``segments``, ``pages`` and ``pixels`` have one
    entry per page: the key of its segment, of its embeddings, and of its pixels.
    """

    root: bytes
    question: bytes
    head: bytes
    segments: tuple[bytes, ...]
    pages: tuple[bytes, ...]
    pixels: tuple[bytes, ...]


@dataclass(frozen=True)
class MissTotals:
    """Misses by reason since the start: of prompt segments, and of page embeddings."""

    segments: Mapping[Reason, int]
    pages: Mapping[Reason, int]


class MissLedger:
    """Names and counts the reasons of misses; every method may be called from any thread.

    It remembers the ``remembered`` most recent digests of each kind. Beyond that it may call
    something new that was there long ago.
    """

    def __init__(self, remembered: int = REMEMBERED_KEYS) -> None:
        self._remembered = remembered
        self._lock = threading.Lock()
        self._segment_totals = Counter[Reason]()
        self._page_totals = Counter[Reason]()
        self._begin()

    def _begin(self) -> None:
        self._segments = RecentKeys(self._remembered)  # keys of heads and of page segments
        self._questions = RecentKeys(self._remembered)  # root, question
        self._shown = RecentKeys(self._remembered)  # head, page or head, pixels
        self._encoded = RecentKeys(self._remembered)  # keys of embeddings, and pixels

    def segment_misses(self, prompt: PromptKeys, reused: int) -> tuple[Reason, ...]:
        """Reasons for the segments of a prompt behind the first ``reused`` (0: the head missed).

        Call it before the prompt is read, and :meth:`remember` afterwards. Pages behind a missed
        head have the head's reason. A page is only ever compared with what was read behind the same
        head, for nothing else could have been reused.
        """
        with self._lock:
            if reused == 0:
                reasons = [self._head_reason(prompt)] * (1 + len(prompt.segments))
            else:
                reasons = [
                    self._segment_reason(prompt, index)
                    for index in range(reused - 1, len(prompt.segments))
                ]
            self._segment_totals.update(reasons)
        return tuple(reasons)

    def remember(self, prompt: PromptKeys, upto: int) -> None:
        """From now on the first ``upto`` segments of a prompt, its head included, are known.

        They were read or found; what time or an error left unread is as new as before, and so is a
        question of which not even the head was read.
        """
        if upto == 0:
            return
        with self._lock:
            self._questions.add(prompt.root + prompt.question)
            for segment in (prompt.head, *prompt.segments)[:upto]:
                self._segments.add(segment)
            for page in (*prompt.pages[: upto - 1], *prompt.pixels[: upto - 1]):
                self._shown.add(prompt.head + page)

    def encoder_miss(self, page: bytes, pixels: bytes) -> Reason:
        """Reason why the embeddings of key ``page`` were not there; ``pixels`` is their page's."""
        with self._lock:
            reason: Reason = "page"
            if page in self._encoded:
                reason = "evicted"
            elif pixels in self._encoded:
                reason = "parameters"
            self._page_totals[reason] += 1
            self._encoded.add(page)
            self._encoded.add(pixels)
        return reason

    def totals(self) -> MissTotals:
        """All counts so far, with a zero for reasons that have not occurred."""
        with self._lock:
            return MissTotals(
                segments={reason: self._segment_totals[reason] for reason in REASONS},
                pages={reason: self._page_totals[reason] for reason in REASONS},
            )

    def forget(self) -> None:
        """Forget what was seen, for caches that were cleared on purpose; the totals stay."""
        with self._lock:
            self._begin()

    def _head_reason(self, prompt: PromptKeys) -> Reason:
        if prompt.head in self._segments:
            return "evicted"
        # The head is made of root, question and number of pages; the first two are as before.
        return "count" if prompt.root + prompt.question in self._questions else "query"

    def _segment_reason(self, prompt: PromptKeys, index: int) -> Reason:
        if prompt.segments[index] in self._segments:
            return "evicted"
        if prompt.head + prompt.pages[index] in self._shown:
            return "order"
        return "parameters" if prompt.head + prompt.pixels[index] in self._shown else "page"
