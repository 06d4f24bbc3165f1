"""The lists that mini is calibrated on: questions over a small pool of pages, with mini's answers.

    python -m mmr5_bench.minidocs.calibration mmr5_runtime/assets/calibration

Pairs of topic and kind are training ones, so that no held-out pair is ever calibrated on. Page
seeds are from a range of their own: neither training nor the held-out set drew from it. The lists
share their pages to stay small enough to ship; scanner noise is what makes a page large, so of
several seeds the one that packs best is taken.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mmr5_bench.minidocs.lists import TOPIC_QUESTION_RATE, PageKey, RerankCase
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.minidocs.vocabulary import (
    KINDS,
    PAIR_QUESTIONS,
    TOPIC_QUESTIONS,
    TOPICS,
    Pair,
    is_held_out,
)
from mmr5_export.checkpoint import open_checkpoint
from mmr5_export.generator import Generator, weights_sha256
from mmr5_export.responses import respond
from mmr5_export.samples import META_FILE, SAMPLES_FILE, read_samples
from mmr5_export.source import locate
from mmr5_runtime.artifact import file_sha256
from mmr5_runtime.image import PixelBudget

CALIBRATION_SEEDS = range(2_000_000, 3_000_000)  # behind TRAIN_SEEDS and HELD_OUT_SEEDS
NUM_LISTS = 160  # 128 to calibrate on, 32 held out
LIST_SIZES = tuple(range(2, 11))
SEED = 0
_CHOICES = 8  # seeds tried for a page
_PAGES = "pages"


def pool_pairs() -> list[Pair]:
    """Topic and kind of every page of the pool: each topic once, every other one in two kinds."""
    chosen = []
    for topic in range(len(TOPICS)):
        kinds = [kind for kind in range(len(KINDS)) if not is_held_out(topic, kind)]
        chosen.append((topic, kinds[topic % len(kinds)]))
        if topic % 2 == 0:
            chosen.append((topic, kinds[(topic + 3) % len(kinds)]))
    return chosen


def page_name(pair: Pair) -> str:
    """File name of the page of ``pair``, relative to the folder of the set."""
    topic, kind = pair
    return f"{_PAGES}/{TOPICS[topic]}-{KINDS[kind].replace(' ', '-')}.webp"


def calibration_cases(num_cases: int = NUM_LISTS, seed: int = SEED) -> list[RerankCase]:
    """Lists of 2 to 10 different pages of the pool; every page is asked for in turn.

    The mix of questions, near misses and hard negatives is that of ``lists.make_case``. Page seeds
    are 0: a pair has one page.
    """
    rng, pool = np.random.default_rng([seed, num_cases]), pool_pairs()
    asked = [pool[int(index)] for index in rng.permutation(len(pool))]
    return [
        _case(rng, pool, asked[index % len(asked)], LIST_SIZES[index % len(LIST_SIZES)])
        for index in range(num_cases)
    ]


def _case(
    rng: np.random.Generator, pool: Sequence[Pair], asked: Pair, num_pages: int
) -> RerankCase:
    topic, kind = asked
    near = [pair for pair in pool if pair[0] == topic and pair != asked]
    others = [pair for pair in pool if pair[0] != topic]
    by_topic = bool(rng.random() < TOPIC_QUESTION_RATE)
    chosen = [asked, *_some(rng, near, int(rng.integers(3)))]
    if not by_topic:
        same_kind = [pair for pair in others if pair[1] == kind]
        chosen += _some(rng, same_kind, int(rng.integers(4)))
    chosen = chosen[:num_pages]
    rest = [pair for pair in others if pair not in chosen]
    chosen += _some(rng, rest, num_pages - len(chosen))
    wordings = TOPIC_QUESTIONS if by_topic else PAIR_QUESTIONS
    wording = wordings[int(rng.integers(len(wordings)))]
    shuffled = [chosen[int(index)] for index in rng.permutation(num_pages)]
    return RerankCase(
        question=wording.format(topic=TOPICS[topic], kind=KINDS[kind]),
        topic=topic,
        kind=None if by_topic else kind,
        pages=tuple(PageKey(*pair, seed=0) for pair in shuffled),
        grades=tuple(
            0 if pair[0] != topic else 2 if by_topic or pair == asked else 1 for pair in shuffled
        ),
    )


def _some(rng: np.random.Generator, pairs: Sequence[Pair], count: int) -> list[Pair]:
    """At most ``count`` different ones of ``pairs``."""
    return [pairs[int(index)] for index in rng.permutation(len(pairs))[:count]]


def render_pooled(pair: Pair, seed: int = SEED) -> tuple[Image.Image, int]:
    """The page of ``pair`` and its seed: of several, the one with the fewest bytes per pixel."""
    rng = np.random.default_rng([seed, *pair])
    drawn = rng.integers(CALIBRATION_SEEDS.start, CALIBRATION_SEEDS.stop, _CHOICES)
    pages = [(render_page(*pair, int(each)), int(each)) for each in drawn]
    return min(pages, key=lambda page: _bytes_per_pixel(page[0]))


def _bytes_per_pixel(page: Image.Image) -> float:
    buffer = io.BytesIO()
    page.save(buffer, "PNG", compress_level=1)
    return buffer.tell() / (page.width * page.height)


def write_set(folder: Path, model: str = "mini", num_lists: int = NUM_LISTS) -> None:
    """Writes pages, ``samples.jsonl`` with the greedy answers of ``model``, and ``meta.json``.

    Raises ``ValueError`` when an answer does not end, or does not tokenize as it was generated: it
    could then not be shipped as text.
    """
    (folder / _PAGES).mkdir(parents=True, exist_ok=True)
    cases = calibration_cases(num_lists)
    seeds = {}
    for pair in sorted({(page.topic, page.kind) for case in cases for page in case.pages}):
        page, seeds[page_name(pair)] = render_pooled(pair)
        # Lossless, and half the size of PNG.
        page.save(folder / page_name(pair), lossless=True, quality=100, method=6)
    rows: list[dict[str, object]] = [
        {
            "query": case.question,
            "pages": [page_name((page.topic, page.kind)) for page in case.pages],
            "relevant": list(case.gold),
        }
        for case in cases
    ]
    _write_rows(folder, rows)
    location = locate(model, None)
    checkpoint = open_checkpoint(location.folder)
    weights = {name: file_sha256(location.folder / name) for name in checkpoint.weight_files}
    generator = Generator(
        checkpoint, weights_sha256(weights), PixelBudget(), device="cpu", dtype="float32"
    )
    generated = respond(read_samples(folder), generator)
    _write_rows(
        folder,
        [{**row, "response": made.text} for row, made in zip(rows, generated, strict=True)],
    )
    reread = respond(read_samples(folder), generator)
    both = zip(rows, generated, reread, strict=True)
    wrong = [row["query"] for row, made, read in both if made != read]
    if wrong:
        raise ValueError(f"the answers to {wrong} cannot be shipped as text")
    meta = {
        "model": location.name,
        "weights_sha256": generator.weights_sha256,
        "weights": weights,
        "dtype": generator.dtype,
        "well_formed": sum(made.status == "ok" for made in generated),
        "first_is_relevant": sum(
            made.order[0] in case.gold for made, case in zip(generated, cases, strict=True)
        ),
        "page_seeds": seeds,
    }
    text = json.dumps(meta, indent=1)
    (folder / META_FILE).write_text(text + "\n", encoding="utf-8")


def _write_rows(folder: Path, rows: Sequence[dict[str, object]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / SAMPLES_FILE).write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write_set(Path(sys.argv[1]))
