"""The evidence document: what was measured, on what, and how to read it back.

Every measuring command ends in one JSON file of this form, and reports and comparisons start from
it. ``pytest --benchmark-json`` writes pytest-benchmark's own form, in which the plugin keeps the
same entries (``extra_info["mmr5"]``) and the machine (``machine_info["mmr5"]``); both are read.

An *entry* is one way of serving some lists: who (``subject``), how (``axes``), which lists
(``work``), and one wall time per list. Entries with equal ``work`` are about the same requests,
list by list, and only those are ever compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Required, TypedDict

from mmr5_bench.evidence.statistics import STATISTICS, Interval, latency_summary
from mmr5_bench.files import read_json, read_lines, write_json

KIND = "mmr5-evidence"
SCHEMA = 1
_WORK = re.compile(r"[0-9a-f]{16}")
_SUMMARIES = ("latency_ms", "ttft_ms", "per_token_ms", "ratios")
_NUMBERS = ("stages_ms", "tokens", "rates", "memory")


class Entry(TypedDict, total=False):
    """One way of serving some lists. Means are over the rounds; ``stages_ms`` adds up to the mean.

    ``work`` has 16 hex digits over everything that decides what was asked: questions, pages, pixel
    budget, prompts, and options that change what is computed. ``samples_ms`` has one wall time per
    round; round i of entries with equal ``work`` is the same list. ``latency_ms`` is
    :func:`~mmr5_bench.evidence.statistics.latency_summary` of it. ``quality`` has an Interval per
    metric and ``cases``, their number. ``pace_ms`` says how long a fixed piece of work took around
    each round (see ``pace``), where that was measured. ``ratios`` has each statistic over that of
    the run's baseline, paired by list, where there is one; ``speedups`` says how many times as fast
    it is, per rival and statistic.
    """

    name: Required[str]
    subject: Required[str]
    axes: Required[dict[str, Any]]
    work: Required[str]
    samples_ms: Required[list[float]]
    latency_ms: Required[dict[str, Interval]]
    pace_ms: list[float]
    warmup: int
    ttft_ms: dict[str, Interval]
    per_token_ms: dict[str, Interval]
    stages_ms: dict[str, float]
    tokens: dict[str, float]
    rates: dict[str, float]
    memory: dict[str, int]
    gpu: dict[str, Any] | None
    quality: dict[str, Any]
    ratios: dict[str, Interval]
    speedups: dict[str, dict[str, Interval]]
    note: str


class QualityRow(TypedDict, total=False):
    """How good the orders of ``subject`` are on ``dataset``, of a run that was not about time.

    ``quality`` is as in :class:`Entry`; ``records`` has what each list gave.
    """

    subject: Required[str]
    dataset: Required[str]
    axes: Required[dict[str, Any]]
    quality: Required[dict[str, Any]]
    records: list[dict[str, Any]] | None


class Skipped(TypedDict):
    """Something that was asked for and not measured, or not to its end."""

    subject: str
    reason: str


class Evidence(TypedDict, total=False):
    """One run. ``title`` and ``note`` say what the figures are of and what they are not."""

    kind: Required[str]
    schema: Required[int]
    title: Required[str]
    note: Required[str]
    created: Required[str]
    machine: Required[dict[str, Any]]
    provenance: Required[dict[str, Any]]
    entries: Required[list[Entry]]
    ceilings: dict[str, Any]
    qualities: list[QualityRow]
    skipped: list[Skipped]
    kernels: list[dict[str, Any]]
    verdict: Any


def new_evidence(title: str, note: str, machine: Mapping[str, Any]) -> Evidence:
    """An empty document of now, by this checkout."""
    from mmr5_bench.provenance import provenance

    return {
        "kind": KIND,
        "schema": SCHEMA,
        "title": title,
        "note": note,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": dict(machine),
        "provenance": provenance(),
        "entries": [],
        "skipped": [],
    }


def load_evidence(path: Path) -> Evidence:
    """Reads one result file of either form, or the ``.jsonl`` that a killed run left behind.

    ValueError naming the file for anything else.
    """
    if path.suffix == ".jsonl":
        data = _last_run(path)
    else:
        data = read_json(path, "name a result file that was written to its end")
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} holds no evidence; write it with mmr5-bench or pytest benchmarks/"
        )
    if "machine_info" in data and isinstance(data.get("benchmarks"), list):
        data = _from_pytest(data, path)
    if data.get("kind") != KIND:
        raise ValueError(
            f"{path} holds {data.get('kind', 'something')!r}, no {KIND}; write it with mmr5-bench "
            "latency, peers or kernels, or with pytest benchmarks/ --benchmark-json"
        )
    if data.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has schema {data.get('schema')!r}, this mmr5-bench reads {SCHEMA}; measure "
            "again, or read it with the version that wrote it"
        )
    for key, kind in (("title", str), ("note", str), ("created", str), ("machine", dict)):
        if not isinstance(data.get(key), kind):
            raise ValueError(f"{path} lacks {key!r}; measure again")
    if not isinstance(data.get("provenance"), dict) or not isinstance(data.get("entries"), list):
        raise ValueError(f"{path} lacks its provenance or entries; measure again")
    try:
        entries = [validate_entry(entry) for entry in data["entries"]]
        for key in ("qualities", "skipped", "kernels"):
            if not all(isinstance(row, dict) for row in _list(data, key)):
                raise ValueError(f"{key} has a row that is no object; measure again")
        for row in _list(data, "qualities"):
            _check_quality(row)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    evidence: Evidence = {**data, "entries": entries}  # type: ignore[typeddict-item]
    return evidence


def write_evidence(evidence: Evidence, path: Path) -> None:
    """Writes the whole document or nothing; a reader never sees half of it."""
    for entry in evidence["entries"]:
        validate_entry(entry)
    write_json(evidence, path)


def validate_entry(entry: Any) -> Entry:
    """``entry`` itself when it is a whole one; ValueError naming the field otherwise."""
    if not isinstance(entry, dict):
        raise ValueError("an entry is an object; measure again")
    name = entry.get("name")
    for key in ("name", "subject"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise ValueError(f"entry {name!r} lacks its {key}; measure again")
    if not isinstance(entry.get("axes"), dict):
        raise ValueError(f"entry {name!r} lacks its axes; measure again")
    if not isinstance(entry.get("work"), str) or not _WORK.fullmatch(entry["work"]):
        raise ValueError(f"entry {name!r}: work {entry.get('work')!r} is not 16 hex digits")
    samples = entry.get("samples_ms")
    if not isinstance(samples, list) or not samples or not all(_is_number(s) for s in samples):
        raise ValueError(f"entry {name!r}: samples_ms has to be a list of times in ms")
    if min(samples) < 0:
        raise ValueError(f"entry {name!r}: samples_ms has a time below zero")
    pace = entry.get("pace_ms", [1.0] * len(samples))
    if not isinstance(pace, list) or len(pace) != len(samples):
        raise ValueError(f"entry {name!r}: pace_ms has to be a list of one time per round")
    if not all(_is_number(value) and value > 0 for value in pace):
        raise ValueError(f"entry {name!r}: pace_ms has what is no time above 0 ms")
    if missing := [key for key in STATISTICS if key not in _mapping(entry, "latency_ms")]:
        raise ValueError(f"entry {name!r} lacks latency_ms.{missing[0]}; measure again")
    for key in _SUMMARIES:
        for statistic, interval in _mapping(entry, key).items():
            if not _is_interval(interval):
                raise ValueError(f"entry {name!r}: {key}.{statistic} is no value with low and high")
    for key in _NUMBERS:
        for field, number in _mapping(entry, key).items():
            if not _is_number(number):
                raise ValueError(f"entry {name!r}: {key}.{field} is no number")
    _check_metrics(f"entry {name!r}", _mapping(entry, "quality"))
    return entry  # type: ignore[return-value]


def _check_quality(row: Any) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("subject"), str):
        raise ValueError("a row of qualities lacks its subject; measure again")
    if not isinstance(row.get("dataset"), str) or not isinstance(row.get("axes"), dict):
        raise ValueError(f"quality of {row['subject']!r} lacks its dataset or axes; measure again")
    _check_metrics(f"quality of {row['subject']!r}", row.get("quality"))


def _check_metrics(what: str, metrics: Any) -> None:
    if not isinstance(metrics, dict):
        raise ValueError(f"{what}: the metrics are no object")
    for metric, value in metrics.items():
        if not (_is_number(value) if metric == "cases" else _is_interval(value)):
            raise ValueError(f"{what}: quality.{metric} is no value with low and high")


def entry_key(entry: Entry) -> tuple[str, str]:
    """What names an entry inside one run, and pairs it with that of another."""
    return entry["name"], entry["subject"]


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key} is no list; measure again")
    return value


def _mapping(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = entry.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"entry {entry['name']!r}: {key} is no object")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_interval(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_number(value.get(k)) for k in ("value", "low", "high")
    )


def _last_run(path: Path) -> dict[str, Any]:
    """The last run of the plugin's journal that finished an entry."""
    last: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    for _, data in read_lines(path):
        if isinstance(head := data.get("evidence"), dict):
            run = {**head, "entries": [], "skipped": []}
        elif run is not None and "entry" in data:
            run["entries"].append(data["entry"])
            last = run
        elif run is not None and "skipped" in data:
            run["skipped"].append(data["skipped"])
    if last is None:
        what = "has no finished entry" if path.is_file() else "is no file and has no finished entry"
        raise ValueError(
            f"{path} {what}; name a result file, or the .jsonl of mmr5-bench latency or pytest "
            "benchmarks/"
        )
    return last


def _from_pytest(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The same document out of pytest-benchmark's; ValueError when the plugin was not there."""
    info, ours = data["machine_info"], data.get("mmr5")
    machine = info.get("mmr5") if isinstance(info, dict) else None
    if not isinstance(ours, dict) or not isinstance(machine, dict):
        raise ValueError(
            f"{path} is of pytest-benchmark without the mmr5 plugin; install the extra `bench` and "
            "measure again"
        )
    entries = [_timed(benchmark, path) for benchmark in data["benchmarks"]]
    return {**ours, "machine": machine, "entries": [entry for entry in entries if entry]}


def _timed(benchmark: Any, path: Path) -> Any:
    """An entry with the times that pytest-benchmark took, which are the ones that count.

    None for a benchmark of something else.
    """
    try:
        entry = benchmark.get("extra_info", {}).get("mmr5")
        samples: Sequence[float] = benchmark.get("stats", {}).get("data") or ()
        if not entry or not samples:
            return entry
        samples_ms = [1e3 * seconds for seconds in samples]
        return {**entry, "samples_ms": samples_ms, "latency_ms": latency_summary(samples_ms)}
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path} has a benchmark that is none ({error}); measure again") from error
