"""Questions with graded candidate lists, and the answer MM-R5 would be trained to give.

Grades: 2 answers the question (gold), 1 is about the topic but of another kind, 0 is neither.
The reference answer ranks by grade and, inside a grade, by ascending image id, as the labels of
MM-R5's fine-tuning do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmr5_bench.minidocs.vocabulary import (
    KINDS,
    PAIR_QUESTIONS,
    TOPIC_QUESTIONS,
    TOPICS,
    Pair,
    pairs,
)

VERDICTS: tuple[str, ...] = (", unrelated", " instead", " as asked")  # by grade
SECOND_GOLD_RATE = 0.06
TOPIC_QUESTION_RATE = 0.15


@dataclass(frozen=True)
class PageKey:
    """Identity of a synthetic page: what ``pages.render_page`` draws."""

    topic: int
    kind: int
    seed: int


@dataclass(frozen=True)
class RerankCase:
    """One question, its candidates in first-stage (random) order, and their grades.

    ``topic`` and ``kind`` are what the question asks for; ``kind`` is None when any will do.
    """

    question: str
    topic: int
    kind: int | None
    pages: tuple[PageKey, ...]
    grades: tuple[int, ...]

    @property
    def gold(self) -> tuple[int, ...]:
        """0-based indices of the pages that answer the question."""
        return tuple(i for i, grade in enumerate(self.grades) if grade == 2)

    @property
    def order(self) -> tuple[int, ...]:
        """The reference ranking: grade descending, index ascending."""
        return tuple(sorted(range(len(self.grades)), key=lambda i: (-self.grades[i], i)))

    def answer(self) -> str:
        """The full target text: what is wanted, each page held against it, the ranked list."""
        wanted = "page" if self.kind is None else KINDS[self.kind]
        lines = [f"The question asks for a {wanted} about {TOPICS[self.topic]}."]
        lines += [
            f"Image {i + 1} shows a {KINDS[page.kind]} about {TOPICS[page.topic]}{VERDICTS[grade]}."
            for i, (page, grade) in enumerate(zip(self.pages, self.grades, strict=True))
        ]
        ids = ", ".join(str(i + 1) for i in self.order)
        return "<think>" + "\n".join(lines) + f"</think><answer>[{ids}]</answer>"


def make_case(
    rng: np.random.Generator, num_pages: int, *, held_out: bool, seeds: range
) -> RerankCase:
    """Draw one case of ``num_pages`` candidates whose page seeds lie in ``seeds``.

    Training cases use only training pairs. Held-out cases ask for a held-out pair; their other
    candidates come from both sides of the split.
    """
    asked = pairs(held_out=held_out)
    topic, kind = asked[int(rng.integers(len(asked)))]
    others = pairs(held_out=False) + (pairs(held_out=True) if held_out else [])
    by_topic = rng.random() < TOPIC_QUESTION_RATE
    several = num_pages >= 4 and rng.random() < SECOND_GOLD_RATE
    golds = 2 if several else 1
    if by_topic:
        wording = TOPIC_QUESTIONS[int(rng.integers(len(TOPIC_QUESTIONS)))]
        same = [pair for pair in others if pair[0] == topic and pair != (topic, kind)]
        chosen: list[tuple[Pair, int]] = [((topic, kind), 2)]
        chosen += [(same[int(rng.integers(len(same)))], 2) for _ in range(golds - 1)]
    else:
        wording = PAIR_QUESTIONS[int(rng.integers(len(PAIR_QUESTIONS)))]
        chosen = [((topic, kind), 2)] * golds
        partial = [pair for pair in others if pair[0] == topic and pair[1] != kind]
        chosen += [(partial[int(rng.integers(len(partial)))], 1) for _ in range(rng.integers(3))]
        chosen += _negatives(rng, others, topic, int(rng.integers(4)), kind=kind)
    chosen = chosen[:num_pages]
    chosen += _negatives(rng, others, topic, num_pages - len(chosen))
    shuffled = [chosen[int(i)] for i in rng.permutation(num_pages)]
    return RerankCase(
        question=wording.format(topic=TOPICS[topic], kind=KINDS[kind]),
        topic=topic,
        kind=None if by_topic else kind,
        pages=tuple(
            PageKey(t, k, int(rng.integers(seeds.start, seeds.stop))) for (t, k), _ in shuffled
        ),
        grades=tuple(grade for _, grade in shuffled),
    )


def _negatives(
    rng: np.random.Generator, pool: list[Pair], topic: int, count: int, *, kind: int | None = None
) -> list[tuple[Pair, int]]:
    """Pages of another topic; of the asked kind (hard) when ``kind`` is given."""
    fitting = [pair for pair in pool if pair[0] != topic and kind in (None, pair[1])]
    return [(fitting[int(rng.integers(len(fitting)))], 0) for _ in range(count)]


TRAIN_SEEDS = range(0, 1_000_000)
HELD_OUT_SEEDS = range(1_000_000, 2_000_000)


def held_out_cases(num_cases: int, num_pages: int, seed: int = 0) -> list[RerankCase]:
    """The evaluation set: ``num_cases`` held-out lists in random first-stage order."""
    rng = np.random.default_rng([seed, num_pages])
    return [
        make_case(rng, num_pages, held_out=True, seeds=HELD_OUT_SEEDS) for _ in range(num_cases)
    ]
