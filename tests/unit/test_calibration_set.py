"""The shipped calibration set: whole, apart from what is measured on, answered by mini itself."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from mmr5_bench.minidocs.calibration import (
    CALIBRATION_SEEDS,
    LIST_SIZES,
    NUM_LISTS,
    calibration_cases,
    page_name,
    pool_pairs,
    render_pooled,
)
from mmr5_bench.minidocs.lists import HELD_OUT_SEEDS, TRAIN_SEEDS, held_out_cases
from mmr5_bench.minidocs.vocabulary import KINDS, TOPICS, is_held_out
from mmr5_export.checkpoint import open_checkpoint
from mmr5_export.generator import Generator, weights_sha256
from mmr5_export.responses import respond
from mmr5_export.samples import Sample, choose, read_samples, shipped_set
from mmr5_export.source import locate
from mmr5_runtime.answer import parse_answer
from mmr5_runtime.artifact import file_sha256
from mmr5_runtime.image import PixelBudget
from mmr5_runtime.pages import open_page


@pytest.fixture(scope="module")
def generator() -> Generator:
    folder = locate("mini", None).folder
    checkpoint = open_checkpoint(folder)
    hashes = {name: file_sha256(folder / name) for name in checkpoint.weight_files}
    return Generator(checkpoint, weights_sha256(hashes), PixelBudget(), dtype="float32")


@pytest.fixture(scope="module")
def samples(generator: Generator) -> list[Sample]:
    return read_samples(shipped_set(), generator.weights_sha256)


def test_it_is_what_the_writer_plans(samples: list[Sample]) -> None:
    cases = calibration_cases()
    assert len(samples) == len(cases) == NUM_LISTS
    for sample, case in zip(samples, cases, strict=True):
        names = [page.relative_to(shipped_set()).as_posix() for page in sample.pages]
        assert names == [page_name((page.topic, page.kind)) for page in case.pages]
        assert (sample.query, sample.relevant) == (case.question, case.gold)
    sizes = Counter(len(sample.pages) for sample in samples)
    assert set(sizes) == set(LIST_SIZES) and set(sizes.values()) <= {17, 18}  # 160 by 9
    assert [len(part) for part in choose(samples, 128, 32, seed=0)] == [128, 32]


def test_every_page_opens_and_none_is_left_over(samples: list[Sample]) -> None:
    used = {page for sample in samples for page in sample.pages}
    for page in used:
        open_page(page)
    assert used == set((shipped_set() / "pages").iterdir())
    assert len(used) == len(pool_pairs())


def test_it_is_apart_from_the_held_out_lists() -> None:
    shown = {(page.topic, page.kind) for case in calibration_cases() for page in case.pages}
    cases = held_out_cases(300, 5)
    asked = {(case.topic, case.kind) for case in cases if case.kind is not None}
    assert asked and not asked & shown
    assert not any(is_held_out(*pair) for pair in shown)
    assert {topic for topic, _ in shown} == set(range(len(TOPICS)))
    assert {kind for _, kind in shown} == set(range(len(KINDS)))
    seeds = json.loads((shipped_set() / "meta.json").read_text())["page_seeds"]
    assert set(seeds) == {page_name(pair) for pair in shown}
    for seed in seeds.values():
        assert seed in CALIBRATION_SEEDS
        assert seed not in TRAIN_SEEDS and seed not in HELD_OUT_SEEDS


def test_lists_do_not_repeat_a_page_and_grade_as_asked() -> None:
    for case in calibration_cases():
        assert len(set(case.pages)) == len(case.pages)
        for page, grade in zip(case.pages, case.grades, strict=True):
            same = page.topic == case.topic
            wanted = same and case.kind in (None, page.kind)
            assert grade == (2 if wanted else 1 if same else 0)
        assert case.gold


def test_a_page_is_the_same_every_time() -> None:
    (first, seed), (again, same) = (render_pooled((3, 4)) for _ in range(2))
    assert seed == same and first.tobytes() == again.tobytes()


def test_pages_are_small(samples: list[Sample]) -> None:
    files = [path for path in shipped_set().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1e6
    assert max(max(open_page(page).size) for page in samples[0].pages) <= 168


def test_answers_rank_well_though_not_all_are_in_form(samples: list[Sample]) -> None:
    # The few that had to be repaired stay: calibration wants what the model writes.
    parsed = [parse_answer(sample.response or "", len(sample.pages)) for sample in samples]
    statuses = Counter(answer.status for answer in parsed)
    meta = json.loads((shipped_set() / "meta.json").read_text())
    assert statuses["ok"] == meta["well_formed"] > 0.95 * NUM_LISTS
    assert statuses["fallback"] == 0
    hits = [
        answer.order[0] in (sample.relevant or ())
        for answer, sample in zip(parsed, samples, strict=True)
    ]
    assert sum(hits) > 0.95 * NUM_LISTS


def test_answers_are_what_mini_decodes(samples: list[Sample], generator: Generator) -> None:
    shipped = [samples[0], samples[2]]
    fresh = respond([replace(sample, response=None) for sample in shipped], generator)
    assert respond(shipped, generator) == fresh
    assert [made.text for made in fresh] == [sample.response for sample in shipped]


def test_held_out_answers_are_kept_because_they_are_its_own(samples: list[Sample]) -> None:
    _, held_out = choose(samples, 128, 32, seed=0)
    assert all(sample.own and sample.response for sample in held_out)


def test_answers_are_left_out_for_other_weights() -> None:
    assert all(sample.response is None for sample in read_samples(shipped_set(), "other"))
