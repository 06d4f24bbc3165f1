"""The engine behind mteb's protocol, with the batches mteb makes but without mteb."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmr5_bench.minidocs.lists import RerankCase, held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.mteb_grouping import shuffled
from mmr5_bench.mteb_reranker import EngineCrossEncoder
from mmr5_runtime import Reranker

TASK = SimpleNamespace(name="MiniDocs")
Batches = list[dict[str, Any]]


@pytest.fixture(scope="module")
def cases() -> list[RerankCase]:
    return held_out_cases(2, 3, seed=21)


@pytest.fixture(scope="module")
def orders(mini_int4: Path, cases: list[RerankCase]) -> list[tuple[int, ...]]:
    """What the engine says to each list by itself."""
    with Reranker.load(mini_int4, "cpu", dtype="float32") as reranker:
        return [reranker.rerank(case.question, draw(case)).order for case in cases]


def draw(case: RerankCase) -> list[Any]:
    return [render_page(page.topic, page.kind, page.seed) for page in case.pages]


def batches(cases: list[RerankCase], size: int, *, ids: bool = True) -> tuple[Batches, Batches]:
    """Questions and pages of all pairs, question by question, ``size`` pairs at a time."""
    asked, shown = [], []
    for number, case in enumerate(cases):
        for place, image in enumerate(draw(case)):
            asked.append({"id": f"q{number}", "text": case.question})
            shown.append({"id": f"q{number}p{place}", "image": image})
    return _batched(asked, size, ids), _batched(shown, size, ids)


def _batched(rows: list[dict[str, Any]], size: int, ids: bool) -> Batches:
    keys = [key for key in rows[0] if ids or key != "id"]
    return [
        {key: [row[key] for row in rows[start : start + size]] for key in keys}
        for start in range(0, len(rows), size)
    ]


def predict(model: EngineCrossEncoder, inputs: tuple[Any, Any]) -> Any:
    return model.predict(
        *inputs, task_metadata=TASK, hf_split="test", hf_subset="default", batch_size=3
    )


@pytest.fixture
def load(mini_int4: Path) -> Iterator[Any]:
    made: list[EngineCrossEncoder] = []

    def make(**options: Any) -> EngineCrossEncoder:
        made.append(EngineCrossEncoder(str(mini_int4), device="cpu", dtype="float32", **options))
        return made[-1]

    yield make
    for model in made:
        model.close()


def found_orders(scores: Any) -> list[tuple[int, ...]]:
    return [tuple(int(i) for i in np.argsort(-row)) for row in np.asarray(scores).reshape(-1, 3)]


@pytest.mark.parametrize("ids", [True, False])
def test_lists_cut_by_batches_are_ranked_whole(
    load: Any, cases: list[RerankCase], orders: list[tuple[int, ...]], ids: bool
) -> None:
    model = load()
    scores = predict(model, batches(cases, 2, ids=ids))
    assert scores.dtype == np.float64
    assert found_orders(scores) == orders
    assert [ranked.order for ranked in model.lists.values()] == orders
    assert [sorted(row) for row in scores.reshape(-1, 3)] == [[1 / 3, 2 / 3, 1.0]] * 2


def test_pairs_may_come_in_any_order(
    load: Any, cases: list[RerankCase], orders: list[tuple[int, ...]]
) -> None:
    asked, shown = batches(cases, 1)
    mixed = [0, 3, 4, 1, 2, 5]
    scores = predict(load(), ([asked[i] for i in mixed], [shown[i] for i in mixed]))
    assert found_orders(scores[np.argsort(mixed)]) == orders


def test_equal_questions_with_their_own_ids_are_two_lists(
    load: Any, cases: list[RerankCase], orders: list[tuple[int, ...]]
) -> None:
    model = load()
    twice = [cases[0], cases[0]]
    assert found_orders(predict(model, batches(twice, 8))) == [orders[0], orders[0]]
    assert len(model.lists) == 2


def test_a_killed_run_goes_on_where_it_was(
    load: Any, cases: list[RerankCase], orders: list[tuple[int, ...]], tmp_path: Path
) -> None:
    kept = tmp_path / "lists.jsonl"
    asked, shown = batches(cases, 2)

    def until_killed() -> Iterator[Mapping[str, Any]]:
        yield from shown[:2]  # four of six pages: one list is whole
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(load(keep_in=kept), (asked, until_killed()))
    assert len(kept.read_text().split()) > 0

    second = load(keep_in=kept)
    asked_engine: list[str] = []
    rerank = second._reranker.rerank

    def listened(question: str, *rest: Any, **options: Any) -> Any:
        asked_engine.append(question)
        return rerank(question, *rest, **options)

    second._reranker.rerank = listened
    assert found_orders(predict(second, (asked, shown))) == orders
    assert asked_engine == [case.question for case in cases[1:]]
    # Other options are another run.
    other = load(keep_in=kept, stop="eos")
    predict(other, batches(cases[:1], 3))
    assert other.revision != second.revision
    assert {line.split('"')[3] for line in kept.read_text().split("\n") if line} == {
        model._kept.run for model in (second, other) if model._kept
    }


def test_shuffled_candidates_come_back_under_their_own_places(
    load: Any, cases: list[RerankCase]
) -> None:
    model = load(shuffle_seed=5)
    found = found_orders(predict(model, batches(cases, 5)))
    orders = [shuffled(3, 5, f"q{number}:{case.question}") for number, case in enumerate(cases)]
    assert any(order != [0, 1, 2] for order in orders)
    for case, shown, order in zip(cases, orders, found, strict=True):
        pages = draw(case)
        answer = model._reranker.rerank(case.question, [pages[i] for i in shown]).order
        assert order == tuple(shown[i] for i in answer)


def test_what_cannot_be_ranked_is_named(load: Any, cases: list[RerankCase]) -> None:
    model = load()
    asked, shown = batches(cases[:1], 3)
    with pytest.raises(ValueError, match="MiniDocs asks without text"):
        predict(model, ([{"image": shown[0]["image"]}], shown))
    with pytest.raises(ValueError, match="MiniDocs has no page images"):
        predict(model, (asked, [{"text": ["a"] * 3}]))
    shown[0]["image"][2] = None
    with pytest.raises(ValueError, match="document q0p2 has no image"):
        predict(model, (asked, shown))
    shown[0]["image"][2] = "no such file.png"
    with pytest.raises(ValueError, match="MiniDocs, question 'q0'.*no such file"):
        predict(model, (asked, shown))


def test_a_revision_of_another_engine_is_refused(load: Any) -> None:
    model = load()
    assert load(revision=model.revision).revision == model.revision
    with pytest.raises(ValueError, match="not abc; leave the revision out"):
        load(revision="abc")
