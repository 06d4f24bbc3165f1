"""The sample pages and the question that ship with the runtime for `make demo`.

python -m mmr5_bench.minidocs.samples mmr5_runtime/assets/samples
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmr5_bench.minidocs.lists import HELD_OUT_SEEDS
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.minidocs.vocabulary import KINDS, PAIR_QUESTIONS, TOPICS

# (topic, kind) in candidate order: the held-out gold page stands third, among the same topic in
# another kind, the same kind about other topics, and a page that shares neither.
SAMPLES = (
    ("wheat", "bar chart"),
    ("rainfall", "table"),
    ("rainfall", "bar chart"),
    ("museum", "text"),
    ("energy", "bar chart"),
)


def write_samples(folder: Path) -> None:
    """Write the pages as numbered PNG files and the question as ``question.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (topic, kind) in enumerate(SAMPLES, start=1):
        seed = HELD_OUT_SEEDS.start + number
        page = render_page(TOPICS.index(topic), KINDS.index(kind), seed)
        page.save(folder / f"{number}-{topic}-{kind.replace(' ', '-')}.png", optimize=True)
    question = PAIR_QUESTIONS[0].format(topic="rainfall", kind="bar chart")
    (folder / "question.txt").write_text(question + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_samples(Path(sys.argv[1]))
