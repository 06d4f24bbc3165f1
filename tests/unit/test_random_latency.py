"""``mmr5-bench random``: an entry per case, kept as they come, on lists that peers get as well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmr5_bench.evidence.document import load_evidence
from mmr5_bench.files import write_json
from mmr5_bench.peers.prompts import PromptReader
from mmr5_bench.peers.workloads import Workload
from mmr5_bench.random_latency import RandomOptions, measure_random, why_no_time
from mmr5_bench.runbook.call import main

SMALL = RandomOptions(
    "tiny", "int4", "small", (2, 3), (4,), ("cold", "warm"), rounds=2, device="cpu"
)


def test_every_case_has_an_entry(tmp_path: Path) -> None:
    output = tmp_path / "new" / "random.json"
    measure_random(SMALL, output)
    evidence = load_evidence(output)
    assert "random int4 weights" in evidence["title"] and "no trained model" in evidence["note"]
    found = [(e["axes"]["pages"], e["axes"]["cache"]) for e in evidence["entries"]]
    assert found == [(2, "cold"), (2, "warm"), (3, "cold"), (3, "warm")]
    for entry in evidence["entries"]:
        assert len(entry["samples_ms"]) == 2 and entry["warmup"] == 1
        assert entry["tokens"]["completion"] == 4 and entry["tokens"]["decode_steps"] == 3
        assert entry["tokens"]["image"] == 12 * entry["axes"]["pages"]
        assert entry["tokens"]["replayed"] == 0
        assert sum(entry["stages_ms"].values()) == pytest.approx(
            entry["latency_ms"]["mean"]["value"]
        )
        assert entry["rates"]["bytes_per_step"] > 0 and entry["memory"]["stored_bytes"] > 0
    cold, warm, *_ = evidence["entries"]
    assert cold["work"] == warm["work"] != evidence["entries"][2]["work"]
    # Pages that were met are not encoded again, but read again behind another question.
    assert cold["stages_ms"]["vision"] > 0 and "vision" not in warm["stages_ms"]
    assert warm["tokens"]["remembered"] == 0


def test_lists_are_those_of_the_peers(tmp_path: Path) -> None:
    evidence = measure_random(replace(SMALL, pages=(2,), caches=("cold",)), tmp_path / "a.json")
    workload = Workload("small", 2, 4, PromptReader.from_random("tiny"), 0, forced=True)
    prompt = len(workload.list(0).prompt_ids)
    assert evidence["entries"][0]["tokens"]["prompt"] == prompt


def test_work_is_that_of_the_peers_however_many_lists_there_are(tmp_path: Path) -> None:
    short = replace(SMALL, pages=(2,), caches=("cold",))
    works = []
    for rounds in (1, 3):
        asked = replace(short, rounds=rounds)
        (entry,) = measure_random(asked, tmp_path / "random.json")["entries"]
        assert len(entry["samples_ms"]) == rounds
        works.append(entry["work"])
    output = tmp_path / "peers.json"
    peers = "--random tiny --device cpu --workload small --pages 2 --generated 4 --lists 2"
    command = ["mmr5_bench.peers.command", *peers.split(), "--peer", "ours-int4"]
    assert main([*command, "-o", str(output)]) == 0
    works += [entry["work"] for entry in load_evidence(output)["entries"]]
    assert len(works) == 3 and len(set(works)) == 1
    (other,) = measure_random(replace(short, seed=1), tmp_path / "random.json")["entries"]
    assert other["work"] not in works


def test_memory_that_is_not_there_skips_a_case_and_a_bug_does_not(tmp_path: Path) -> None:
    output = tmp_path / "random.json"

    def run_out(line: str) -> None:
        if "cache=cold" in line and "pages=2" in line:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")

    measure_random(SMALL, output, say=run_out)
    skipped = load_evidence(output)["skipped"]
    assert [one["reason"] for one in skipped] == ["CUDA out of memory."]
    assert len(load_evidence(output)["entries"]) == 4

    def fail(line: str) -> None:
        if "cache=cold" in line:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure_random(SMALL, output, say=fail)


def test_a_case_begins_only_with_time_for_two_lists() -> None:
    assert why_no_time(10.0, 4.9, 60.0) is None
    reason = why_no_time(10.0, 5.1, 60.0)
    assert reason == "10.0 of 60 seconds were left, and a list took 5.1"
    assert why_no_time(-1.0, 0.0, 60.0) == "the 60 seconds were over"


def test_time_that_is_over_skips_the_rest(tmp_path: Path) -> None:
    evidence = measure_random(replace(SMALL, seconds=1e-3), tmp_path / "late.json")
    assert [len(entry["samples_ms"]) for entry in evidence["entries"]] == [1]
    assert len(evidence["skipped"]) == 3
    assert "seconds were over" in evidence["skipped"][0]["reason"]


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "cut.json"

    def interrupt(line: str) -> None:
        if "cache=warm" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_random(SMALL, output, say=interrupt)
    caches = [entry["axes"]["cache"] for entry in load_evidence(output)["entries"]]
    assert caches == ["cold", "warm"]


def test_ceilings_come_from_a_result_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = "--shape tiny --workload small --pages 2 --generated 2 --rounds 1 --device cpu".split()
    machine = tmp_path / "machine.json"
    environment = ["mmr5_bench.runbook.environment", "--shape", "tiny", "--device", "cpu"]
    assert main([*environment, "--seconds", "5", "-o", str(machine)]) == 0
    written = ["mmr5_bench.random_command", *short, "-o", str(tmp_path / "random.json")]
    assert main([*written, "--ceilings", str(machine)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["ceilings"] == load_evidence(machine)["ceilings"]
    assert document["entries"][0]["samples_ms"] == 1  # bulky records are left out there

    bare = {**json.loads(machine.read_text()), "ceilings": {}}
    write_json(bare, machine)
    assert main([*written, "--ceilings", str(machine)]) == 1
    assert "has no ceilings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"workload": "large"}, "workload 'large' is unknown"),
        ({"caches": ("hot",)}, "cache 'hot' is unknown"),
        ({"rounds": 0}, "at least 1"),
        ({"pages": (1,)}, "pages at least 2"),
    ],
)
def test_bad_options_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changed)  # type: ignore[arg-type]
