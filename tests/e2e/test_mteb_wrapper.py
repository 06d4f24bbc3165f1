"""mteb itself on an engine: its scores equal those computed from the engine's own orders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

mteb = pytest.importorskip(
    "mteb", reason="mteb is not installed; pip install 'mmr5-runtime[mteb]' to run its tasks"
)
datasets = pytest.importorskip("datasets", reason="datasets, which comes with mteb, is missing")

from mmr5_bench import mteb_command  # noqa: E402
from mmr5_bench.evidence.quality import ndcg_at, reciprocal_rank  # noqa: E402
from mmr5_bench.minidocs.lists import RerankCase, held_out_cases  # noqa: E402
from mmr5_bench.minidocs.pages import render_page  # noqa: E402
from mmr5_bench.mteb_reranker import EngineCrossEncoder  # noqa: E402
from mmr5_runtime import Reranker  # noqa: E402
from mmr5_runtime.agreement import recall_at  # noqa: E402

NAME = "MiniDocsPageReranking"
SIZES = (3, 6)


def all_cases() -> list[RerankCase]:
    """Lists of several sizes; the last asks the first one's question over its pages reversed."""
    cases = [case for size in SIZES for case in held_out_cases(3, size, seed=33)]
    first = cases[0]
    return [*cases, replace(first, pages=first.pages[::-1], grades=first.grades[::-1])]


def relevant(case: RerankCase) -> tuple[int, ...]:
    """Any two pages: those that answer come first in most orders, and would leave metrics at 1."""
    return 0, len(case.pages) - 1


def task_class() -> Any:
    """A task as mteb defines one, over pages drawn here."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class MiniDocsPageReranking(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = TaskMetadata(
            name=NAME,
            description="Synthetic pages, one question per list.",
            dataset={"path": "local/minidocs", "revision": "1"},
            type="Reranking",
            category="t2i",
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_5",
        )

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            if getattr(self, "data_loaded", False):
                return
            ids, images, questions = [], [], []
            golds: dict[str, dict[str, int]] = {}
            listed: dict[str, list[str]] = {}
            for number, case in enumerate(all_cases()):
                query, names = f"q{number}", [f"q{number}p{i}" for i in range(len(case.pages))]
                ids += names
                images += [render_page(p.topic, p.kind, p.seed) for p in case.pages]
                questions.append({"id": query, "text": case.question})
                golds[query] = {names[i]: 1 for i in relevant(case)}
                listed[query] = names
            columns = {"id": datasets.Value("string"), "image": datasets.Image()}
            pages = {"id": ids, "image": images}
            self.dataset = {
                "default": {
                    "test": {
                        "corpus": datasets.Dataset.from_dict(pages, datasets.Features(columns)),
                        "queries": datasets.Dataset.from_list(questions),
                        "relevant_docs": golds,
                        "top_ranked": listed,
                    }
                }
            }
            self.data_loaded = True

    return MiniDocsPageReranking


@pytest.fixture(scope="module")
def orders(mini_int4: Path) -> list[tuple[int, ...]]:
    found = []
    with Reranker.load(mini_int4, "cpu", dtype="float32") as reranker:
        for case in all_cases():
            pages = [render_page(p.topic, p.kind, p.seed) for p in case.pages]
            found.append(reranker.rerank(case.question, pages).order)
    return found


def by_hand(orders: list[tuple[int, ...]]) -> dict[str, float]:
    """mteb's metrics of these orders, by the definitions of our own evaluation."""
    pairs = list(zip(orders, [relevant(case) for case in all_cases()], strict=True))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        **{f"recall_at_{k}": mean([recall_at(o, g, k) for o, g in pairs]) for k in (1, 3, 5)},
        **{f"ndcg_at_{k}": mean([ndcg_at(o, g, k) for o, g in pairs]) for k in (1, 3, 5)},
        "mrr_at_10": mean([reciprocal_rank(o, g) for o, g in pairs]),
    }


def test_mteb_scores_equal_those_of_the_orders(
    mini_int4: Path, orders: list[tuple[int, ...]], tmp_path: Path
) -> None:
    model = EngineCrossEncoder(str(mini_int4), device="cpu", dtype="float32")
    result = mteb.evaluate(
        model,
        task_class()(),
        cache=None,
        encode_kwargs={"batch_size": 4},  # cuts lists of 3 and 6
        prediction_folder=tmp_path,
        show_progress_bar=False,
    )
    model.close()
    (scores,) = result[0].scores["test"]
    wanted = by_hand(orders)
    assert {name: scores[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    assert result[0].get_score() == pytest.approx(wanted["ndcg_at_5"], abs=1e-5)
    # None is 0 or 1, or a wrong order could not be told from a right one.
    assert all(0 < wanted[name] < 1 for name in ("recall_at_1", "recall_at_3", "ndcg_at_5")), wanted

    saved = json.loads((tmp_path / f"{NAME}_predictions.json").read_text())
    assert saved["mteb_model_meta"]["revision"] == model.revision
    for number, order in enumerate(orders):
        predicted = saved["default"]["test"][f"q{number}"]
        assert len(set(predicted.values())) == len(order)
        ranked = sorted(predicted, key=lambda page: -predicted[page])
        assert ranked == [f"q{number}p{i}" for i in order]
    assert [ranked.order for ranked in model.lists.values()] == orders


def test_the_model_is_described_as_what_it_is(mini_int4: Path) -> None:
    model = EngineCrossEncoder(str(mini_int4), device="cpu", dtype="float32", think="off")
    meta = model.mteb_model_meta
    assert meta.is_cross_encoder and meta.name.endswith("-int4")
    assert meta.revision == model.revision
    assert meta.experiment_kwargs["quant"] == "int4"
    assert meta.experiment_kwargs["think"] == "off"
    assert "no similarity" in meta.experiment_kwargs["scores"]
    assert isinstance(model, mteb.CrossEncoderProtocol)
    assert meta.to_dict()["modalities"] == ["text", "image"]
    model.close()


@pytest.fixture
def registered() -> Iterator[None]:
    """The task under its name, as mteb's own tasks are."""
    from mteb.get_tasks import _TASKS_REGISTRY

    _TASKS_REGISTRY[NAME] = task_class()
    yield
    del _TASKS_REGISTRY[NAME]


def command(tmp_path: Path, engine: Path, *arguments: str) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    mteb_command.add_arguments(parser)
    output = tmp_path / "result.json"
    fixed = ["--engine", str(engine), "--dtype", "float32", "-o", str(output)]
    options = parser.parse_args([*fixed, *arguments])
    return mteb_command.run(options), output


@pytest.mark.usefixtures("registered")
def test_the_command_writes_scores_and_lists(
    mini_int4: Path,
    orders: list[tuple[int, ...]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, output = command(tmp_path, mini_int4, "--task", NAME, "--max-new-tokens", "600")
    document = json.loads(output.read_text())
    (task,) = document["tasks"]
    assert status == 0
    assert task["main_score"] == pytest.approx(by_hand(orders)["ndcg_at_5"], abs=1e-5)
    assert task["lists"] == len(orders) == sum(task["status"].values())
    assert [tuple(record["order"]) for record in task["records"]] == orders
    assert document["options"] == {"max_new_tokens": 600, "shuffle_seed": None}
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["tasks"][0]["main_score"] == task["main_score"]
    assert summary["tasks"][0]["records"] is None
    kept = [line for line in output.with_suffix(".jsonl").read_text().split("\n") if line]
    assert len(kept) == len(orders)

    # A second run takes every list from the file.
    again, _ = command(tmp_path, mini_int4, "--task", NAME, "--max-new-tokens", "600")
    assert again == 0
    assert json.loads(output.read_text())["tasks"] == document["tasks"]


@pytest.mark.usefixtures("registered")
def test_a_first_stage_makes_the_lists(mini_int4: Path, tmp_path: Path) -> None:
    first = {
        f"q{number}": {f"q{number}p{i}": float(-i) for i in range(len(case.pages))}
        for number, case in enumerate(all_cases())
    }
    meta = {"model_name": "first/stage", "revision": "1"}
    previous = tmp_path / "previous.json"
    previous.write_text(json.dumps({"mteb_model_meta": meta, "default": {"test": first}}))
    arguments = ("--task", NAME, "--previous-results", str(previous), "--top-k", "2")
    status, output = command(tmp_path, mini_int4, *arguments)
    (task,) = json.loads(output.read_text())["tasks"]
    assert status == 0
    assert {len(record["order"]) for record in task["records"]} == {2}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "NoSuchTask"), "no task 'NoSuchTask'"),
        (("--task", "Banking77Classification"), "no retrieval or reranking task"),
        (("--task", "MMDocIRT2ITRetrieval"), "pass --previous-results"),
        (("--task", NAME, "--top-k", "3"), "give both"),
        (("--task", NAME, "--previous-results", "nowhere"), "nowhere is not there"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused(
    mini_int4: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        command(tmp_path, mini_int4, *arguments)
