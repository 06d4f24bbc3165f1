"""Summaries and comparisons of results that are written down here, record by record."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmr5_bench.mmdocir.annotations import DOMAINS
from mmr5_bench.mmdocir.evidence_entry import evidence_of
from mmr5_bench.mmdocir.records import Journal, Record, check_record
from mmr5_bench.mmdocir.results import check_comparable, load_results, note
from mmr5_bench.mmdocir.summary import summarise
from mmr5_bench.mmdocir.table import table_of

Document = dict[str, Any]


def _record(question: int, order: list[int], gold: list[int], **changes: Any) -> Record:
    record: Record = {
        "question": question,
        "document": question,
        "domain": DOMAINS[question % 10],
        "gold": gold,
        "candidates": sorted(order),
        "order": order,
        "status": "ok",
        "stop_reason": "determined",
        "error": None,
        "interventions": 0,
        "exactness": "bit_identical",
        "tokens": {"prompt": 100 + question, "image": 80, "completion": 10, "decode_steps": 9},
        "ms": 10.0 + question,
        "first_token_ms": 4.0,
        "stages_ms": {"decode": 6.0 + question, "other": 4.0},
        "text_sha256": "00",
    }
    return {**record, **changes}  # type: ignore[typeddict-item]


def _document(records: list[Record], questions: int | None = None) -> Document:
    return {
        "kind": "mmdocir-results",
        "schema": 1,
        "note": "made up",
        "created": "2026-01-01T00:00:00+00:00",
        "machine": {"id": "0" * 16},
        "provenance": {},
        "run": "0" * 16,
        "identity": {
            "data": {
                "annotations_sha256": "aa",
                "pages_sha256": "bb",
                "published": False,
                "questions": questions or len(records),
            },
            "candidates": {"sha256": "cc", "first_stage": "colqwen", "depth": 20, "k": 3},
            "prompt": {"profile": "mm-r5", "template_sha256": "dd", "tokenizer_sha256": "ee"},
            "pixels": {"min_pixels": 3136, "max_pixels": 37632, "image": {}},
            "engine": {"name": "e", "quant": "int4", "dtype": "float32", "source": "mini"},
        },
        "options": {"top_k": None, "cache": "off", "stop": "determined", "think": "full"},
        "records": records,
    }


def _ten() -> list[Record]:
    """One question of each domain; the first three are right at once, the rest in third place."""
    return [_record(n, [2, 1, 0] if n < 3 else [0, 1, 2], [2]) for n in range(10)]


def test_micro_and_macro_stand_next_to_the_first_stage() -> None:
    summary = summarise(_document(_ten()))
    assert summary["micro"]["recall@1"]["value"] == 0.3
    assert summary["macro"]["recall@1"]["value"] == pytest.approx(0.3)
    assert summary["macro"]["recall@3"]["value"] == 1.0
    assert summary["macro_without_news"]["recall@1"]["value"] == pytest.approx(3 / 9)
    assert summary["first_stage"]["micro"]["recall@1"]["value"] == 0.0
    assert summary["over_first_stage"]["micro"]["mrr"]["value"] == pytest.approx(0.2)
    assert summary["ceilings"]["candidates"]["recall@1"] == {"micro": 1.0, "macro": 1.0}
    assert [row["recall@1"] for row in summary["domains"]] == [1.0] * 3 + [0.0] * 7
    assert summary["tokens"]["prompt"] == {
        "mean": 104.5,
        "p95": pytest.approx(108.55),
        "max": 109.0,
    }
    assert summary["latency_ms"]["3"]["questions"] == 10
    assert summary["latency_ms"]["all"]["p50"]["value"] == 14.5


@pytest.mark.parametrize(("count", "questions"), [(10, 11), (9, 9)])
def test_no_macro_of_a_part_is_quoted(count: int, questions: int) -> None:
    document = _document(_ten()[:count], questions)
    document["summary"] = summarise(document)
    assert document["summary"]["subset"] and document["summary"]["macro"] is None
    assert document["summary"]["macro_of_subset"]["recall@1"]["value"] == pytest.approx(0.3)
    (entry,) = evidence_of(document)["entries"]
    assert not any(name.startswith("macro") for name in entry["quality"])
    lines = table_of(document).splitlines()
    assert any(line.startswith("macro: not quoted") for line in lines)
    assert not any(line.startswith("macro  ") for line in lines)


def test_errors_count_with_the_order_of_the_first_stage() -> None:
    records = _ten()
    error = {"type": "PageError", "message": "page 2 is broken"}
    for question in (0, 4):
        records[question] = _record(
            question, [0, 1, 2], [0], status="error", error=error, ms=None, tokens=None,
            first_token_ms=None, stages_ms={}, text_sha256=None, stop_reason=None,
        )  # fmt: skip
    records[5] = _record(5, [0, 1, 2], [0], status="fallback")
    records[6] = _record(6, [1], [1], stop_reason="single_page")
    summary = summarise(_document(records))
    assert summary["micro"]["recall@1"]["value"] == pytest.approx(6 / 10)
    rates = {name: rate["value"] for name, rate in summary["rates"].items()}
    assert rates == {"ok": 0.7, "repaired": 0.0, "fallback": 0.1, "error": 0.2}
    first = {"question": 0, "message": "page 2 is broken"}
    assert summary["errors"] == {"PageError": {"count": 2, "first": first}}
    found = {name: group["questions"] for name, group in summary["latency_ms"].items()}
    assert found == {"all": 7, "1": 1, "3": 7}
    assert summary["stop_reasons"] == {"determined": 7, "single_page": 1}


def test_two_runs_are_compared_question_by_question() -> None:
    before, after = _document(_ten()), _document(_ten())
    after["records"][3] = _record(3, [2, 0, 1], [2], text_sha256="11")  # now right
    after["records"][0] = _record(0, [1, 2, 0], [2])  # no longer
    after["records"][1] = _record(1, [2, 0, 1], [2])  # the others in another order
    against = summarise(after, before)["against"]
    assert against["first_page"]["value"] == 0.8
    assert against["order"]["value"] == pytest.approx(0.7)
    taus = [1.0] * 7 + [1 / 3] * 2 + [-1 / 3]
    assert against["kendall_tau"]["value"] == pytest.approx(sum(taus) / 10)
    assert against["same_text"]["value"] == pytest.approx(0.9)
    assert against["differences"]["micro"]["recall@1"]["value"] == 0.0
    assert against["differences"]["micro"]["recall@1"]["low"] < 0.0
    assert against["changed"]["recall@1"] == {"better": 1, "worse": 1}
    same = summarise(before, before)["against"]
    assert same["differences"]["macro"]["recall@1"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_orders_are_compared_as_far_as_both_were_ranked() -> None:
    before, after = _document(_ten()), _document(_ten())
    after["options"] = {**after["options"], "top_k": 1}
    after["records"] = [_record(n, [2, 0, 1] if n < 3 else [0, 2, 1], [2]) for n in range(10)]
    against = summarise(after, before)["against"]
    assert against["compared_places"] == 1
    assert against["order"]["value"] == 1.0
    assert against["kendall_tau"] is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.annotations_sha256", "x", "different annotation files .aa and x."),
        ("data.pages_sha256", "x", "different pages files"),
        ("candidates.sha256", "x", "different candidates"),
        ("candidates.k", 5, "different numbers of candidates .3 and 5."),
        ("prompt.profile", "x", "different prompt profiles .mm-r5 and x."),
        ("prompt.template_sha256", "x", "different prompt templates"),
        ("prompt.tokenizer_sha256", "x", "different tokenizers"),
        ("pixels.max_pixels", 4000, "different pixel budgets .3136 to 37632 and 3136 to 4000."),
    ],
)
def test_other_work_is_refused(path: str, value: Any, message: str) -> None:
    document, reference = _document(_ten()), _document(_ten())
    part, key = path.split(".")
    reference["identity"][part][key] = value
    with pytest.raises(ValueError, match=message):
        summarise(document, reference)


def test_other_questions_and_edited_candidates_are_refused() -> None:
    document = _document(_ten())
    with pytest.raises(ValueError, match="10 questions and the other 9; pass the same --limit"):
        check_comparable(document, _document(_ten()[:9]))
    edited = copy.deepcopy(document)
    edited["records"][4] = _record(4, [0, 1, 3], [2])
    with pytest.raises(ValueError, match="different candidates for question 4, though"):
        check_comparable(document, edited)
    document["identity"]["engine"]["quant"] = "bf16"  # what comparisons are for
    check_comparable(document, _document(_ten()))


def test_notes_say_what_figures_are_not() -> None:
    identity = _document(_ten())["identity"]
    assert "no figures of MM-R5" in note(identity) and "no figures of MMDocIR" in note(identity)
    identity["engine"]["source"], identity["data"]["published"] = "i2vec/MM-R5", True
    assert note(identity) == "engine made from i2vec/MM-R5"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(kind="other"), "no results of schema 1"),
        (lambda d: d.update(schema=0), "no results of schema 1"),
        (lambda d: d.pop("identity"), "is damaged"),
        (lambda d: d["identity"].pop("pixels"), "is damaged"),
        (lambda d: d["options"].update(top_k="all"), "is damaged .its top_k"),
        (lambda d: d["records"][1].pop("gold"), "is damaged .it lacks 'gold'"),
        (lambda d: d["records"][1].update(status="good"), "is damaged .its status 'good'"),
        (lambda d: d["records"][1].update(order=[0, 1]), "no permutation"),
        (lambda d: d["records"][1].update(order=[0, 1, 1]), "no permutation"),
        (lambda d: d["records"][1].update(ms="fast"), "its ms is 'fast'"),
        (lambda d: d["records"][1].update(tokens={"prompt": 1}), "tokens are not all there"),
        (lambda d: d["records"][1].update(status="error"), "contradicts"),
        (lambda d: d["records"][1].update(domain="Sports"), "has the domain 'Sports'"),
        (lambda d: d["records"].pop(1), "lacks questions or has them twice"),
        (lambda d: d["records"].clear(), "lacks questions"),
        (lambda d: d["identity"]["data"].update(questions=5), "lacks questions or has them twice"),
    ],
)
def test_a_bad_results_file_is_named(
    tmp_path: Path, change: Callable[[Document], None], message: str
) -> None:
    document, path = _document(_ten()), tmp_path / "results.json"
    path.write_text(json.dumps(document))
    assert load_results(path) == document
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"results.json .*{message}"):
        load_results(path)


def test_what_is_no_results_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match="cannot be read"):
        load_results(path)
    path.write_bytes(b"{")
    with pytest.raises(ValueError, match="no JSON"):
        load_results(path)


def test_any_cut_of_the_journal_loses_at_most_its_last_record(tmp_path: Path) -> None:
    records = [_record(0, [0, 1], [1]), _record(1, [1, 0], [1], text="Größe")]
    journal = Journal(tmp_path / "r.jsonl", "run")
    assert journal.read() == {}
    for record in records:
        journal.add(record)
    Journal(journal.path, "another").add(_record(2, [0, 1], [1]))
    assert journal.read() == dict(enumerate(records))
    whole = journal.path.read_bytes().rpartition(b'\n{"run":"another"')[0]
    for cut in range(0, len(whole), 7):
        journal.path.write_bytes(whole[:cut])
        assert set(journal.read()) <= {0, 1}
        journal.add(_record(5, [0, 1], [1]))
        kept = set(journal.read()) - {5}
        assert kept == ({0, 1} if cut >= len(whole) - 1 else {0} if 0 in kept else set())
        assert 5 in journal.read()


def test_a_changed_line_of_the_journal_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "r.jsonl", "run")
    broken = {**_record(0, [0, 1], [1]), "order": [0, 5]}
    journal.path.write_text(json.dumps({"run": "run", "record": broken}) + "\n")
    with pytest.raises(ValueError, match="line 1: its order is no permutation .*delete the line"):
        journal.read()
    assert check_record(_record(0, [1, 0], [1]))["order"] == [1, 0]
