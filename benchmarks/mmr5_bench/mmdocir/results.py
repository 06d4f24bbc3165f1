"""The results file of a run: written at its end, read for summaries and comparisons.

``kind`` is ``mmdocir-results``; ``identity`` says what was asked of what, ``records`` has every
question, ``summary`` the figures made from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmr5_bench.files import read_json
from mmr5_bench.mmdocir.annotations import DOMAINS
from mmr5_bench.mmdocir.records import Record, check_record
from mmr5_bench.mmdocir.work import Work
from mmr5_bench.provenance import provenance

KIND = "mmdocir-results"
SCHEMA = 2
MM_R5 = "i2vec/MM-R5"  # on the hub
_NEEDED = {
    "note": str,
    "created": str,
    "run": str,
    "machine": dict,
    "provenance": dict,
    "identity": dict,
    "options": dict,
    "records": list,
}
_ENGINE = ("name", "quant", "method", "source", "dtype", "device")
_OPTIONS = ("top_k", "cache", "stop", "think", "plan")

# What has to be equal before two runs are compared: where it stands, what it is called, and why.
_COMPARABLE = (
    (("data", "annotations_sha256"), "annotation files", "the questions differ"),
    (("data", "pages_sha256"), "pages files", "the pixels differ"),
    (("candidates", "sha256"), "candidates", "first stages of one name differ by points"),
    (("candidates", "k"), "numbers of candidates", "a longer list is another task"),
    (("prompt", "profile"), "prompt profiles", "the model is asked something else"),
    (("prompt", "template_sha256"), "prompt templates", "the model is asked something else"),
    (("prompt", "tokenizer_sha256"), "tokenizers", "the model is asked something else"),
    (("pixels",), "pixel budgets", "the model sees something else"),
)


def results_document(work: Work, records: Sequence[Record]) -> dict[str, Any]:
    """The document without its summary."""
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "note": note(work.identity),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": work.machine,
        "provenance": provenance(),
        "run": work.key,
        "identity": work.identity,
        "options": asdict(work.options),
        "records": list(records),
    }


def note(identity: Mapping[str, Any]) -> str:
    """What the figures are of, and what they are not.

    Only the checkpoint's own name on the hub is taken for MM-R5; a folder may be called anything.
    """
    source, data = identity["engine"]["source"], identity["data"]
    parts = [f"engine made from {source}"]
    if source == "mini":
        parts.append("these are no figures of MM-R5")
    elif source != MM_R5:
        parts.append("whether that is MM-R5 was not checked")
    if not data["published"]:
        parts.append("not the published annotations: these are no figures of MMDocIR")
    return "; ".join(parts)


def load_results(path: Path) -> dict[str, Any]:
    """Reads and checks a results file; ValueError naming it and the remedy."""
    data = read_json(path, "name the output of `mmr5-bench mmdocir run`")
    if not isinstance(data, dict) or data.get("kind") != KIND or data.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} holds no results of schema {SCHEMA}; name the output of `mmr5-bench mmdocir "
            "run` of this version"
        )
    try:
        for key, kind in _NEEDED.items():
            if not isinstance(data.get(key), kind):
                raise ValueError(f"it lacks its {key}")
        required = (
            *(names for names, _, _ in _COMPARABLE),
            ("data", "published"),
            ("candidates", "first_stage"),
            *(("engine", name) for name in _ENGINE),
        )
        for names in required:
            _at(data["identity"], names)
        for name in _OPTIONS:
            _at(data["options"], (name,))
        whole = int(data["identity"]["data"]["questions"])
        top_k, k = data["options"]["top_k"], data["identity"]["candidates"]["k"]
        if top_k is not None and type(top_k) is not int:
            raise ValueError(f"its top_k is {top_k!r}")
        if type(k) is not int:
            raise ValueError(f"its number of candidates is {k!r}")
        records = [check_record(record) for record in data["records"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); run the benchmark again") from error
    asked = [record["question"] for record in records]
    if not asked or asked != list(range(len(asked))) or len(asked) > whole:
        raise ValueError(f"{path} lacks questions or has them twice; run the benchmark again")
    if unknown := {record["domain"] for record in records} - set(DOMAINS):
        raise ValueError(f"{path} has the domain {min(unknown)!r}, which MMDocIR has not")
    return data


def check_comparable(document: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """ValueError unless both runs asked the same of the same pages; one sentence on the first."""
    check_alike(document["identity"], len(document["records"]), reference)
    for record, other in zip(document["records"], reference["records"], strict=True):
        if record["candidates"] != other["candidates"]:
            raise ValueError(
                f"the two runs have different candidates for question {record['question']}, though "
                "their checksums agree; one of the files was edited"
            )


def check_alike(identity: Mapping[str, Any], questions: int, reference: Mapping[str, Any]) -> None:
    """The same for a run that has not begun: what it will ask, and how many questions."""
    for names, called, why in _COMPARABLE:
        found, wanted = (_at(one, names) for one in (identity, reference["identity"]))
        if found != wanted:
            raise ValueError(
                f"the two runs have different {called} ({_short(found)} and {_short(wanted)}), so "
                f"{why}; run both with the same"
            )
    if questions != len(reference["records"]):
        raise ValueError(
            f"one run asks {questions} questions and the other {len(reference['records'])}; pass "
            "the same --limit"
        )


def _at(identity: Mapping[str, Any], names: Sequence[str]) -> Any:
    value: Any = identity
    for name in names:
        value = value[name]
    return value


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('min_pixels')} to {value.get('max_pixels')}"
    return str(value)[:16]
