"""MMDocIR runs of mini over a small data set: recall, going on, comparing, and odd pages."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.mmdocir_bruteforce import averages
from helpers.mmdocir_files import Paper, drawn_papers, jpeg, plain, write_data
from helpers.mmdocir_runs import freeze, invoke, load, open_run, run_command
from mmr5_bench.evidence.document import load_evidence
from mmr5_bench.mmdocir import command
from mmr5_bench.mmdocir import work as work_module
from mmr5_bench.mmdocir.annotations import DOMAINS
from mmr5_bench.mmdocir.records import Journal, Record
from mmr5_bench.mmdocir.run import run
from mmr5_runtime import Reranker
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.types import Mmr5Error

PAPERS = 10
QUESTIONS = 11
TIMES = ("ms", "first_token_ms", "stages_ms")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten documents of six drawn pages, eleven questions, in another order in the table."""
    folder = tmp_path_factory.mktemp("mmdocir")
    papers = drawn_papers(PAPERS)
    write_data(folder, papers, list(reversed(range(PAPERS))), shards=2, group=7)
    freeze(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, mini_int4: Path) -> Path:
    """Results of all questions, without reasoning, which takes mini most of its time."""
    output = data / "whole.json"
    assert run_command(data, mini_int4, output, "--evidence", data / "evidence.json") == 0
    return output


def _timeless(records: list[Record]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def test_records_are_those_of_plain_reranks(
    data: Path, mini_int4: Path, whole: Path, tmp_path: Path
) -> None:
    papers, records = drawn_papers(PAPERS), load(whole)["records"]
    assert [record["question"] for record in records] == list(range(QUESTIONS))
    thinking = run(open_run(data, mini_int4, think="full", limit=1), tmp_path / "r.jsonl")
    with Reranker.load(mini_int4, "cpu", cache=CacheConfig.off()) as reranker:
        for record, think in ((records[1], "off"), (records[7], "off"), (thinking[0], "full")):
            paper = papers[record["document"]]
            question, gold = paper.questions[record["question"] if paper is papers[0] else 0]
            pages = [paper.pages[page] or b"" for page in record["candidates"]]
            options: dict[str, Any] = {"think": think}
            result = reranker.rerank(question, pages, **options)
            assert record["order"] == [record["candidates"][index] for index in result.order]
            assert (record["gold"], record["domain"]) == (gold, paper.domain)
            assert (record["text"], record["status"]) == (result.text, result.status)
            tokens = record["tokens"] or {}
            assert tokens["completion"] == result.usage.completion_tokens
            assert record["ms"] == pytest.approx(sum(record["stages_ms"].values()), abs=0.1)
    assert "<think>" in thinking[0]["text"]


def test_the_summary_is_that_of_a_second_implementation(whole: Path) -> None:
    document = load(whole)
    summary, records = document["summary"], document["records"]
    for orders, found in (("order", summary), ("candidates", summary["first_stage"])):
        answered = [(r["domain"], r[orders], r["gold"]) for r in records]
        for k in (1, 3, 5):
            mean, over_ten, _ = averages(answered, k)
            assert found["micro"][f"recall@{k}"]["value"] == pytest.approx(float(mean))
            assert found["macro"][f"recall@{k}"]["value"] == pytest.approx(float(over_ten))
    assert not summary["subset"]
    assert summary["rates"]["error"]["value"] == 0.0
    assert (
        summary["micro"]["recall@1"]["value"] > summary["first_stage"]["micro"]["recall@1"]["value"]
    )
    assert "not the published annotations" in document["note"]
    assert "no figures of MM-R5" in document["note"]
    assert document["identity"]["data"]["published"] is False


def test_the_evidence_file_can_be_read(data: Path, whole: Path) -> None:
    (entry,) = load_evidence(data / "evidence.json")["entries"]
    records = load(whole)["records"]
    assert entry["samples_ms"] == [record["ms"] for record in records]
    assert entry["quality"]["macro_recall@1"] == load(whole)["summary"]["macro"]["recall@1"]
    assert entry["axes"]["pages"] == 3
    assert entry["subject"] == "int4 int4"  # folder and quantization
    assert (entry["axes"]["dtype"], entry["axes"]["plan"]) == ("float32", "single")
    assert entry["warmup"] == 1
    assert sum(entry["stages_ms"].values()) == pytest.approx(np.mean(entry["samples_ms"]), abs=0.1)


def test_an_interrupted_run_goes_on(
    data: Path,
    mini_int4: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "part.json"
    limit = ("--limit", "5")

    def stop(done: int, total: int, record: Record | None) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(command, "_progress", stop)
        assert run_command(data, mini_int4, output, *limit) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not output.exists()
    journal = output.with_suffix(".jsonl")
    before = journal.read_bytes()
    assert before.count(b'"record"') == 3
    journal.write_bytes(before[:-40])  # killed while it wrote the third

    assert run_command(data, mini_int4, output, *limit) == 0
    assert "2 of 5 questions" in capsys.readouterr().err
    assert _timeless(load(output)["records"]) == _timeless(load(whole)["records"][:5])
    after = journal.read_bytes()
    assert after.startswith(before[:-40])

    assert run_command(data, mini_int4, output, *limit) == 0  # nothing is left to ask
    assert journal.read_bytes() == after
    out = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(out)["records"] is None


def test_the_key_covers_what_decides_a_record(data: Path, mini_int4: Path) -> None:
    first = open_run(data, mini_int4)
    assert first.key == open_run(data, mini_int4).key == open_run(data, mini_int4, limit=3).key
    changes: list[dict[str, Any]] = [
        {"k": 5},
        {"top_k": 1},
        {"stop": "eos"},
        {"think": "full"},
        {"max_new_tokens": 64},
        {"temperature": 0.3, "seed": 1},
        {"temperature": 0.3, "seed": 2},
        {"max_pixels": 12_544},
        {"profile": "mm-r5-images-first"},
        {"dtype": "bfloat16"},
        {"cache": "on"},
        {"plan": "auto"},
    ]
    keys = {open_run(data, mini_int4, **change).key for change in changes}
    assert len(keys | {first.key}) == len(changes) + 1


def test_the_key_covers_the_code_and_the_image_library(
    data: Path, mini_int4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = open_run(data, mini_int4).key
    with monkeypatch.context() as patch:
        patch.setattr(work_module, "code_files", lambda: [Path(__file__)])
        assert open_run(data, mini_int4).key != key
    with monkeypatch.context() as patch:
        patch.setattr("PIL.__version__", "0.0")
        assert open_run(data, mini_int4).key != key
    assert open_run(data, mini_int4).key == key


def test_other_pages_make_another_run(data: Path, mini_int4: Path, tmp_path: Path) -> None:
    papers = drawn_papers(PAPERS)
    papers[3].pages[0] = plain(1)
    write_data(tmp_path, papers, list(reversed(range(PAPERS))), shards=2, group=7)
    (tmp_path / "candidates-5.json").write_bytes((data / "candidates-5.json").read_bytes())
    assert open_run(tmp_path, mini_int4).key != open_run(data, mini_int4).key


def test_the_first_questions_are_a_subset_and_no_macro_is_quoted(
    data: Path, mini_int4: Path, tmp_path: Path
) -> None:
    output = tmp_path / "few.json"
    assert run_command(data, mini_int4, output, "--limit", "3", "--no-text") == 0
    document, journal = load(output), output.with_suffix(".jsonl")
    before = journal.read_bytes()
    assert run_command(data, mini_int4, output, "--limit", "3") == 0
    assert journal.read_bytes() == before
    assert len(document["records"]) == 3
    assert all("text" not in r and len(r["text_sha256"]) == 64 for r in document["records"])
    assert document["summary"]["subset"] is True
    assert document["summary"]["macro"] is None
    found = document["summary"]["macro_of_subset"]["recall@5"]["value"]
    per_domain = {row["domain"]: row["recall@5"] for row in document["summary"]["domains"]}
    assert found == pytest.approx(sum(per_domain[domain] for domain in DOMAINS) / 10)


def test_a_run_is_compared_with_another_on_the_same_lists(
    data: Path, mini_int4: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = tmp_path / "first.json", tmp_path / "eos.json"
    shutil.copy(whole.with_suffix(".jsonl"), first.with_suffix(".jsonl"))
    limit = ("--limit", "3")
    assert run_command(data, mini_int4, first, *limit) == 0
    assert run_command(data, mini_int4, other, *limit, "--stop", "eos", "--reference", first) == 0
    against = load(other)["summary"]["against"]
    assert against["first_page"]["value"] == against["order"]["value"] == 1.0
    assert against["kendall_tau"]["value"] == 1.0
    assert against["same_text"]["value"] < 1.0
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert against["differences"]["micro"]["recall@1"] == zero
    capsys.readouterr()
    assert invoke("summary", other, "--against", first) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["summary"]["against"] == against
    assert "kendall tau" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-pixels", "12544"], "different pixel budgets .3136 to 12544 and 3136 to 37632"),
        (["--profile", "mm-r5-images-first"], "different prompt profiles"),
        (["--k", "4"], "different numbers of candidates"),
        (["--limit", "4"], "pass the same --limit"),
    ],
)
def test_runs_that_asked_something_else_are_refused_before_they_begin(
    data: Path, mini_int4: Path, whole: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_command(data, mini_int4, tmp_path / "a.json", "--reference", whole, *options)
    assert list(tmp_path.iterdir()) == []


def _odd(folder: Path, pages: list[bytes | None], question: str = "Which?") -> Path:
    """A data set of one document, all of whose pages are candidates."""
    write_data(folder, [Paper("odd.pdf", "News", pages, [(question, [0])])])
    freeze(folder, depth=5)
    return folder


PAGE = plain(3, 112, 140)


@pytest.mark.parametrize(
    ("pages", "stop_reason"),
    [
        ([jpeg(Image.new("RGB", (14, 600))), PAGE, PAGE], "determined"),  # 14 pixels wide
        ([plain(1), PAGE, plain(2)], "determined"),  # a document of three pages
        ([PAGE], "single_page"),
        ([PAGE] * 5, "determined"),  # identical
        ([jpeg(Image.new("RGB", (1920, 1080))), PAGE], "determined"),
    ],
)
def test_odd_pages_are_ranked(
    mini_int4: Path, tmp_path: Path, pages: list[bytes | None], stop_reason: str
) -> None:
    work = open_run(_odd(tmp_path, pages), mini_int4, k=5)
    (record,) = run(work, tmp_path / "r.jsonl")
    assert record["status"] in ("ok", "repaired")
    assert sorted(record["order"]) == list(range(len(pages)))
    assert record["stop_reason"] == stop_reason


@pytest.mark.parametrize(
    ("pages", "options", "kind", "message"),
    [
        ([PAGE, b"no image", PAGE], {}, "PageError", "page 1|page 2|page 3"),
        ([PAGE, None, PAGE], {}, "PageError", "page 1 of odd.pdf has no image in the pages file"),
        (
            [PAGE] * 5,
            {"min_pixels": 784_000, "max_pixels": 784_000},
            "ContextOverflowError",
            "the context holds 4096",
        ),
        ([jpeg(Image.new("RGB", (3, 900))), PAGE], {}, "PageError", "more than 200 times"),
    ],
)
def test_what_cannot_be_asked_is_counted(
    mini_int4: Path,
    tmp_path: Path,
    pages: list[bytes | None],
    options: dict[str, Any],
    kind: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = _odd(tmp_path, pages)
    work = open_run(data, mini_int4, k=5, **options)
    (record,) = run(work, tmp_path / "r.jsonl")
    assert record["status"] == "error" and record["error"] is not None
    assert record["error"]["type"] == kind
    assert record["order"] == record["candidates"]
    assert record["ms"] is None and record["tokens"] is None
    assert Journal(tmp_path / "r.jsonl", work.key).read() == {0: record}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert run_command(data, mini_int4, tmp_path / "r.json", "--k", "5", *arguments) == 1
    summary = load(tmp_path / "r.json")["summary"]
    assert summary["failed"] == summary["errors"][kind]["count"] == 1
    assert summary["rates"]["error"]["value"] == 1.0
    assert summary["micro"] == summary["first_stage"]["micro"]
    assert "not one question could be asked" in capsys.readouterr().err


def test_the_model_is_warm_once_it_has_run(mini_int4: Path, tmp_path: Path) -> None:
    papers = [
        Paper("a.pdf", "News", [PAGE], [("Which?", [0])]),  # not asked of the model
        Paper("b.pdf", "Laws", [PAGE, b"broken"], [("Which?", [0])]),
        Paper("c.pdf", "Laws", [PAGE, plain(4)], [("Which?", [0])]),
        Paper("d.pdf", "Laws", [PAGE], [("Which?", [0])]),
    ]
    write_data(tmp_path, papers)
    freeze(tmp_path)
    records = run(open_run(tmp_path, mini_int4), tmp_path / "r.jsonl")
    assert [record["status"] == "error" for record in records] == [False, True, False, False]
    assert [record["warm"] for record in records] == [False, False, True, True]


def test_one_candidate_each_is_a_run_with_evidence(
    data: Path, mini_int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, evidence = tmp_path / "r.json", tmp_path / "evidence.json"
    options = ("--k", "1", "--limit", "2", "--evidence", evidence)
    assert run_command(data, mini_int4, output, *options) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]["failed"] == 0
    found = load_evidence(evidence)
    assert found["entries"] == [] and "no time to report" in found["skipped"][0]["reason"]
    assert found["qualities"][0]["quality"]["cases"] == 2


def test_results_are_there_when_the_evidence_cannot_be_written(
    data: Path, mini_int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "r.json"
    (tmp_path / "file").write_text("in the way of a folder")
    with pytest.raises(OSError):
        run_command(
            data, mini_int4, output, "--limit", "1", "--evidence", tmp_path / "file" / "e.json"
        )
    summary = load(output)["summary"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["summary"] == summary


def test_one_bad_question_does_not_stop_the_others(mini_int4: Path, tmp_path: Path) -> None:
    papers = drawn_papers(2)
    papers[0].pages = [b"broken", *papers[0].pages[1:]]
    papers[0].questions.append((" ", [1]))
    write_data(tmp_path, papers)
    freeze(tmp_path)
    records = run(open_run(tmp_path, mini_int4), tmp_path / "r.jsonl")
    failed = {record["question"] for record in records if record["status"] == "error"}
    broken = {r["question"] for r in records if r["document"] == 0 and 0 in r["candidates"]}
    assert failed == {2} | broken
    assert len(failed) < len(records) == 4
    errors = [record["error"] for record in records if record["question"] == 2]
    assert errors[0] is not None and errors[0]["type"] == "RequestError"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "6"], "--k 6: these candidates have 5 pages"),
        (["--k", "0"], "--k 0"),
        (["--limit", "0"], "--limit 0"),
        (["--temperature", "0.3"], "without --seed"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--data", "absent"], "there is no data folder"),
        (["--device", "tpu"], "device='tpu' is unknown"),
        (["--profile", "absent"], "no prompt template"),
        (["-o", "results.jsonl"], "name a .json"),
        (["--reference", "absent.json"], "cannot be read"),
    ],
)
def test_misuse_is_named(
    data: Path, mini_int4: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises((ValueError, Mmr5Error), match=message):
        run_command(data, mini_int4, tmp_path / "r.json", *options)
    assert list(tmp_path.iterdir()) == []


def test_sampling_repeats_with_its_seed(data: Path, mini_int4: Path, tmp_path: Path) -> None:
    work = open_run(data, mini_int4, temperature=1.5, seed=4, limit=1, max_new_tokens=24)
    first, again = (run(work, tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    assert _timeless(first) == _timeless(again)
