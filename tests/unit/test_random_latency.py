"""``mmr5-bench random``: an entry per case, kept as they come, on lists that peers get as well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmr5_bench.evidence.document import load_evidence
from mmr5_bench.files import write_json
from mmr5_bench.peers.prompts import PromptReader
from mmr5_bench.peers.workloads import Workload
from mmr5_bench.random_latency import RandomOptions, measure_random
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
    workload = Workload("small", 2, 4, PromptReader.from_random("tiny"), 0)
    prompt = len(workload.list(0).prompt_ids)
    assert evidence["entries"][0]["tokens"]["prompt"] == prompt


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
