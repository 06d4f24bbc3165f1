"""What a run says of itself as evidence: entries, failed questions, warm-up, and its code."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

from helpers.mmdocir_records import failed_record, made_document, made_record, ten_records
from mmr5_bench.evidence.document import load_evidence, write_evidence
from mmr5_bench.mmdocir.evidence_entry import NOT_TIMED, evidence_of
from mmr5_bench.mmdocir.summary import summarise
from mmr5_bench.mmdocir.table import table_of
from mmr5_bench.mmdocir.work import code_files, code_sha256

OWN_CODE = ("run", "pages", "work", "records", "candidates", "annotations")


def test_failed_questions_are_named_wherever_figures_are() -> None:
    document = made_document(
        [failed_record(n) if n in (0, 4) else record for n, record in enumerate(ten_records())]
    )
    document["summary"] = summarise(document)
    said = "2 of 10 questions could not be asked; they count with the first stage's order"
    assert (document["summary"]["failed"], document["summary"]["failed_note"]) == (2, said)
    assert said in table_of(document).splitlines()
    evidence = evidence_of(document)
    assert evidence["skipped"] == [{"subject": "mini-int4 int4", "reason": said}]
    (entry,) = evidence["entries"]
    assert entry["note"] == f"made up; {said}"
    shares = {name: entry["quality"][name]["value"] for name in ("ok", "error")}
    assert shares == {"ok": 0.8, "error": 0.2}
    whole = made_document(ten_records())
    whole["summary"] = summarise(whole)
    assert evidence_of(whole)["skipped"] == []
    assert evidence_of(whole)["entries"][0]["note"] == "made up"
    assert evidence_of(whole)["entries"][0]["quality"]["error"]["value"] == 0.0
    assert "could not be asked" not in table_of(whole)


def test_entries_say_what_was_measured() -> None:
    document = made_document(ten_records())
    document["summary"] = summarise(document)
    (entry,) = evidence_of(document)["entries"]
    assert entry["subject"] == "mini-int4 int4"
    for part, key, value in (
        ("options", "plan", "cascade"),
        ("engine", "dtype", "bfloat16"),
        ("engine", "device", "cuda"),
        ("engine", "method", "rtn"),
    ):
        other = copy.deepcopy(document)
        (other if part == "options" else other["identity"])[part][key] = value
        (found,) = evidence_of(other)["entries"]
        assert found["axes"] == {**entry["axes"], key: value}
        assert f"{key}={value}" in found["name"]
        assert (found["work"] == entry["work"]) == (part == "engine")
    document["identity"]["engine"]["name"] = "other"
    assert evidence_of(document)["entries"][0]["subject"] == "other int4"


def test_a_warm_up_that_did_not_happen_is_not_counted() -> None:
    document = made_document(ten_records())
    document["summary"] = summarise(document)
    (entry,) = evidence_of(document)["entries"]
    assert entry["warmup"] == 1
    document["records"][2]["warm"] = False
    (entry,) = evidence_of(document)["entries"]
    assert entry["warmup"] == 0
    assert "1 of 10 times are of a model that had not run before" in entry["note"]


def test_lists_of_one_page_have_quality_and_no_time(tmp_path: Path) -> None:
    document = made_document([made_record(n, [1], [1]) for n in range(10)])
    document["summary"] = summarise(document)
    write_evidence(evidence_of(document), tmp_path / "evidence.json")
    evidence = load_evidence(tmp_path / "evidence.json")
    assert evidence["entries"] == []
    assert [one["reason"] for one in evidence["skipped"]] == [NOT_TIMED]
    (row,) = evidence["qualities"]
    assert row["quality"]["recall@1"]["value"] == 1.0
    assert row["axes"]["dtype"] == "float32"


def test_the_hash_of_the_code_covers_what_makes_a_record(tmp_path: Path) -> None:
    files = code_files()
    names = {"/".join(file.parts[-2:]) for file in files}
    assert names >= {f"mmdocir/{name}.py" for name in OWN_CODE} | {"evidence/observe.py"}
    assert {"mmr5_runtime/answer.py", "mmr5_kernels/__init__.py"} <= names
    assert not any(name.startswith("mmr5_bench/") for name in names)  # reuse.py and the others
    before, copied = code_sha256(files), []
    for number, file in enumerate(files):
        copied.append(tmp_path / str(number) / file.name)
        copied[-1].parent.mkdir()
        shutil.copy(file, copied[-1])
    assert code_sha256(copied) == before
    copied[-1].write_text(copied[-1].read_text() + "#\n")
    assert code_sha256(copied) != before
