"""The evidence document: written whole, read strictly, from either form."""

from __future__ import annotations

import json
import mmap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mmr5_bench.evidence.ceilings import measure_ceilings
from mmr5_bench.evidence.document import (
    Evidence,
    load_evidence,
    new_evidence,
    validate_entry,
    write_evidence,
)
from mmr5_bench.evidence.gpu import GpuSampler
from mmr5_bench.evidence.machine import DECIDING, describe_machine, machine_differences
from mmr5_bench.evidence.memory import PeakMemory, resident_bytes
from mmr5_bench.evidence.observe import entry_of, observation, observe, work_id
from mmr5_bench.evidence.pace import Pace
from mmr5_bench.evidence.statistics import STATISTICS, latency_summary
from mmr5_bench.files import append_lines, read_json, read_lines, write_json, write_text
from mmr5_runtime.loading import EngineInfo
from mmr5_runtime.types import RerankResult, Usage

ENGINE = EngineInfo("ab" * 32, "mm-r5", "float32", "cpu", 3136, 37632, 4096, 1000, 10)


def _result(tokens: int = 11, steps: int = 10) -> RerankResult:
    return RerankResult(
        order=(0, 1),
        status="ok",
        stop_reason="determined",
        text="",
        reasoning="",
        usage=Usage(100, 60, tokens, 2, decode_steps=steps),
        timings_ms={"prefill": 30.0, "decode": 50.0, "total": 85.0},
        first_token_ms=40.0,
    )


def _evidence() -> Evidence:
    evidence = new_evidence("Mini", "says nothing about MM-R5", describe_machine())
    observed = [observation(ms, _result()) for ms in (90.0, 110.0)]
    entry = entry_of("rerank[pages=2]", "ours", {"pages": 2}, work_id("a"), observed, warmup=1)
    evidence["entries"].append(entry)
    return evidence


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    evidence = _evidence()
    evidence["qualities"] = [
        {
            "subject": "ours",
            "dataset": "MiniDocs",
            "axes": {},
            "quality": {"cases": 3, "mrr": {"value": 0.5, "low": 0.1, "high": 0.9}},
        }
    ]
    write_evidence(evidence, tmp_path / "deep" / "e.json")
    assert load_evidence(tmp_path / "deep" / "e.json") == evidence
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["e.json"]


def test_an_entry_adds_up() -> None:
    observed = [observation(ms, _result()) for ms in (90.0, 110.0)]
    entry = entry_of(
        "e", "ours", {}, work_id(1), observed, warmup=1, engine=ENGINE, memory_bytes_per_s=1e6
    )
    assert entry["samples_ms"] == [90.0, 110.0] and entry["latency_ms"]["p50"]["value"] == 100.0
    assert entry["stages_ms"] == {"prefill": 30.0, "decode": 50.0, "other": 20.0}
    assert entry["ttft_ms"]["p50"]["value"] == 40.0
    assert entry["per_token_ms"]["mean"]["value"] == pytest.approx((5.0 + 7.0) / 2)
    # 10 steps of 50 ms: 1,000 bytes of weights and 10 for each of 100 + 11 / 2 tokens.
    assert entry["rates"]["bytes_per_step"] == pytest.approx(1000 + 10 * 105.5)
    assert entry["rates"]["step_ms"] == pytest.approx(5.0)
    assert entry["rates"]["floor_ms_per_step"] == pytest.approx(2.055)
    assert entry["rates"]["memory_share"] == pytest.approx(2.055 / 5.0)


def test_nothing_decoded_has_no_rate() -> None:
    observed = [observation(90.0, _result(tokens=1, steps=0))]
    entry = entry_of("e", "ours", {}, work_id(1), observed, warmup=0, engine=ENGINE)
    assert entry["rates"] == {} and "per_token_ms" not in entry


def test_observing_times_the_call() -> None:
    def call() -> RerankResult:
        time.sleep(0.09)
        return _result()

    seen = observe(call)
    assert seen.ms >= 90 and seen.result == _result()
    assert sum(seen.stages_ms.values()) == pytest.approx(seen.ms)
    with pytest.raises(ValueError, match="80.0 ms in a request of 70.0 ms"):
        observation(70.0, _result())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "name"),
        ({"subject": None}, "subject"),
        ({"axes": []}, "axes"),
        ({"work": "xyz"}, "16 hex"),
        ({"samples_ms": []}, "samples_ms"),
        ({"samples_ms": [1, "2"]}, "samples_ms"),
        ({"samples_ms": [-1.0]}, "below zero"),
        ({"pace_ms": [8.0]}, "one time per round"),
        ({"pace_ms": [8.0, 0.0]}, "above 0 ms"),
        ({"latency_ms": {}}, "lacks latency_ms.p50"),
        ({"latency_ms": dict.fromkeys(STATISTICS, 3)}, "latency_ms.p50"),
        ({"ttft_ms": [1]}, "ttft_ms"),
        ({"stages_ms": {"vision": "a"}}, "stages_ms.vision"),
        ({"quality": {"mrr": 0.5}}, "quality.mrr"),
        ({"quality": {"cases": "all"}}, "quality.cases"),
    ],
)
def test_a_broken_entry_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_entry({**_evidence()["entries"][0], **change})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON.*written to its end"),
        ("[]", "holds no evidence"),
        ('{"kind": "weather"}', "'weather', no mmr5-evidence"),
        ('{"kind": "mmr5-evidence", "schema": 2}', "schema 2"),
        ('{"kind": "mmr5-evidence", "schema": 1}', "lacks 'title'"),
        ('{"machine_info": {}, "benchmarks": []}', "without the mmr5 plugin"),
        ('{"machine_info": null, "benchmarks": []}', "without the mmr5 plugin"),
        ('{"machine_info": {"mmr5": {}}, "mmr5": {}, "benchmarks": [3]}', "that is none"),
    ],
)
def test_a_broken_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(ValueError, match=f"e.json.*{message}"):
        load_evidence(tmp_path / "e.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.json cannot be read"):
        load_evidence(tmp_path / "absent.json")


def test_pytest_benchmarks_own_times_count(tmp_path: Path) -> None:
    ours = dict(_evidence())
    entry, machine = ours.pop("entries")[0], ours.pop("machine")  # type: ignore[index]
    benchmark = {"extra_info": {"mmr5": entry}, "stats": {"data": [0.2, 0.4]}}
    other = {"extra_info": {}, "stats": {"data": [1.0]}}
    recording = {"machine_info": {"mmr5": machine}, "benchmarks": [benchmark, other], "mmr5": ours}
    (tmp_path / "p.json").write_text(json.dumps(recording))
    evidence = load_evidence(tmp_path / "p.json")
    assert [e["samples_ms"] for e in evidence["entries"]] == [[200.0, 400.0]]
    assert evidence["entries"][0]["latency_ms"] == latency_summary([200.0, 400.0])
    assert evidence["machine"] == machine


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text("before")
    with pytest.raises(ValueError):
        write_json({"value": float("nan")}, tmp_path / "e.json")
    assert (tmp_path / "e.json").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_machines_differ_in_what_decides_speed() -> None:
    here = describe_machine()
    assert machine_differences(here, {**here, "load": 99.0, "memory_bytes": 1}) == []
    for key in DECIDING:
        [difference] = machine_differences(here, {**here, key: "another"})
        assert difference.startswith(f"{key}: ") and "another" in difference
    assert here["gpu"] is None and len(here["id"]) == 16


def test_ceilings_are_measured_or_missing_with_a_reason() -> None:
    found = measure_ceilings("cpu", ("float32", "bfloat16", "int8", "fp8"), dry_run=True)
    assert found["memory_bytes_per_s"] == max(found["copy_bytes_per_s"], found["read_bytes_per_s"])
    assert set(found["matmul_flops"]) == {"float32", "bfloat16"}
    assert set(found["missing"]) == {"int8", "fp8"} and all(found["missing"].values())
    with pytest.raises(ValueError, match="int3"):
        measure_ceilings("cpu", ["int3"], dry_run=True)


def touched(size: int) -> mmap.mmap:
    """Memory of its own, which no allocator has lying about."""
    taken = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        taken[page] = 1
    return taken


def test_memory_and_gpu_are_watched() -> None:
    with PeakMemory() as memory, GpuSampler("cpu") as gpu:
        before, held = resident_bytes(), touched(64 << 20)
        time.sleep(0.2)
    peak = memory.bytes()["peak_rss_bytes"]
    assert before + len(held) // 2 < peak < before + 4 * len(held)
    with memory:  # again, and it goes on sampling
        more = touched(256 << 20)
        time.sleep(0.2)
    assert memory.bytes()["peak_rss_bytes"] > peak + len(more) // 2
    assert gpu.summary() is None and gpu.missing == "no CUDA device is measured"


def test_a_journal_loses_only_what_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "j.jsonl"
    assert list(read_lines(path)) == []
    append_lines(path, [{"a": "\u2028"}, {"a": 2}])
    with path.open("ab") as file:
        file.write(b'{"a": 3')
    append_lines(path, [{"a": 4}])
    assert [data["a"] for _, data in read_lines(path)] == ["\u2028", 2, 4]
    with pytest.raises(ValueError):
        append_lines(path, [{"a": float("nan")}])


def test_reading_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    write_text("[" * 100_000, tmp_path / "deep.json")
    with pytest.raises(ValueError, match="deep.json is no JSON.*try again"):
        read_json(tmp_path / "deep.json", "try again")


@pytest.mark.parametrize("key", ["qualities", "skipped", "kernels"])
@pytest.mark.parametrize("value", [None, 3, [3]])
def test_lists_are_lists_of_objects(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps({**_evidence(), key: value}))
    with pytest.raises(ValueError, match=f"e.json.*{key}"):
        load_evidence(tmp_path / "e.json")


def test_the_pace_is_of_work_that_is_always_the_same() -> None:
    first, second = Pace("cpu"), Pace("cpu")
    assert torch.equal(first._weight, second._weight) and torch.equal(first._input, second._input)
    assert first.time_ms() > 0
