"""From scored pairs to ranked lists and back: what a listwise model needs of mteb's protocol.

mteb asks for one number per pair of a question and a page, in an order and in batches of its own.
A listwise model needs all pages of a question at once and gives an order. So the questions of all
pairs are read first (text only), pages are then taken one by one, and a list is ranked as soon as
its last page is there: only the pages of unfinished lists are held, wherever batches were cut.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmr5_bench.files import append_lines, read_lines

Q = TypeVar("Q", bound=Hashable)
P = TypeVar("P")


def score_pairs(
    questions: Sequence[Q], pages: Iterable[P], rank: Callable[[Q, list[P]], Sequence[int]]
) -> list[float]:
    """One score per pair, in the order of the pairs.

    Pair i is ``questions[i]`` with the i-th of ``pages``; equal questions are one list, be they
    neighbours or not. ``rank`` gets a list's pages in the order of the pairs and returns their
    indices, best first. Scores are :func:`rank_scores` inside each list; those of two lists cannot
    be compared. ValueError for fewer or more pages than questions, and when ``rank`` returns no
    permutation.
    """
    missing = Counter(questions)
    waiting: dict[Q, list[tuple[int, P]]] = {}
    scores = [0.0] * len(questions)
    count = 0
    for count, page in enumerate(pages, start=1):
        if count > len(questions):
            raise ValueError(f"there are {len(questions)} questions and more pages; pair them")
        question = questions[count - 1]
        waiting.setdefault(question, []).append((count - 1, page))
        missing[question] -= 1
        if not missing[question]:
            places, listed = zip(*waiting.pop(question), strict=True)
            order = rank(question, list(listed))
            for place, score in zip(places, rank_scores(order, len(listed)), strict=True):
                scores[place] = score
    if count < len(questions):
        raise ValueError(f"there are {len(questions)} questions and {count} pages; pair them")
    return scores


def rank_scores(order: Sequence[int], count: int) -> list[float]:
    """Score of each of ``count`` candidates by its place in ``order``: 1, then 1/count less.

    Strictly decreasing along the order, so that whoever sorts by score gets the order back however
    ties are broken. ValueError when ``order`` is no permutation of ``range(count)``.
    """
    if sorted(order) != list(range(count)):
        raise ValueError(f"{list(order)} is no order of {count} candidates")
    scores = [0.0] * count
    for place, candidate in enumerate(order):
        scores[candidate] = (count - place) / count
    return scores


def shuffled(count: int, seed: int, key: str) -> list[int]:
    """A permutation of ``range(count)`` that is the same for the same ``seed`` and ``key``."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return [int(index) for index in rng.permutation(count)]


@dataclass(frozen=True)
class RankedList:
    """One finished list: indices into its candidates as mteb gave them, and how it went."""

    order: tuple[int, ...]
    status: str
    stop_reason: str
    ms: float

    def to_json(self) -> dict[str, Any]:
        return {
            "order": list(self.order),
            "status": self.status,
            "stop_reason": self.stop_reason,
            "ms": self.ms,
        }


@dataclass(frozen=True)
class KeptLists:
    """Finished lists of ``run``, a line of JSON each, so that a killed run goes on where it was.

    ``run`` names everything that decides an order but the list itself. Lines of other runs stay in
    the file and are passed over, and so is one that was cut off.
    """

    path: Path
    run: str

    def add(self, key: str, ranked: RankedList) -> None:
        """Adds one list; OSError when the disk takes only a part of it."""
        append_lines(self.path, [{"run": self.run, "key": key, **ranked.to_json()}])

    def read(self) -> dict[str, RankedList]:
        """Every whole list of this run by its key; empty when there is no file yet."""
        found: dict[str, RankedList] = {}
        for _, data in read_lines(self.path):
            if data.get("run") == self.run:
                found[data["key"]] = RankedList(
                    tuple(data["order"]), data["status"], data["stop_reason"], data["ms"]
                )
        return found
