"""The proof of kernels: every check counts, and nothing but a GPU's run is a record."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from mmr5_bench import prove_command
from mmr5_bench.proof import session
from mmr5_bench.proof.case import Case, Finding, near, same, worst
from mmr5_bench.proof.linear_cases import multiplies_fp8_rows
from mmr5_bench.proof.record import Checked, lines, new_record, states
from mmr5_bench.proof.session import every_case, poisoned_memory, run_cases
from mmr5_kernels.table import TABLE
from mmr5_kernels.target import CUDA_KERNELS

CPU = torch.device("cpu")


def checked(name: str, status: str, *kernels: str) -> Checked:
    return {
        "name": name,
        "kernels": list(kernels),
        "status": status,  # type: ignore[typeddict-item]
        "error": 0.5 if status == "wrong" else None,
        "allowed": 0.1 if status == "wrong" else None,
        "reason": "",
    }


def test_a_kernel_is_proven_by_all_of_its_checks() -> None:
    found = states(
        [
            checked("a", "right", "x", "y"),
            checked("b", "wrong", "y"),
            checked("c", "not run", "z"),
            checked("d", "right", "z"),
            checked("e", "error", "w"),
            checked("f", "not run", "w"),
        ]
    )
    assert found == {"w": "failed", "x": "right", "y": "failed", "z": "unfinished"}


def test_a_record_replaces_its_own_gpu_only() -> None:
    before = {
        "sm_80": {"commit": "a", "date": "2026-01-01", "kernels": ["x"]},
        "sm_90": {"commit": "a", "date": "2026-01-01", "kernels": ["old"]},
    }
    made = {"commit": "b", "date": "2026-02-02"}
    after = new_record(before, (9, 0), {"y": "right", "x": "right", "z": "failed"}, **made)
    assert after["sm_80"] == before["sm_80"]
    assert after["sm_90"] == {**made, "kernels": ["x", "y"]}
    assert list(new_record(before, (9, 0), {"y": "failed"}, **made)) == ["sm_80"]
    assert new_record({}, (8, 6), {"y": "unfinished"}, **made) == {}


def test_findings() -> None:
    one = torch.ones(3)
    assert near(one * 1.01, one, 0.02).is_right and not near(one * 1.01, one, 0.001).is_right
    assert not near(one * float("nan"), one, 1.0).is_right
    assert same(one, one.clone()).is_right and not same(one, one.double()).is_right
    assert not same(one, one + torch.tensor([0.0, 0.0, 1e-7])).is_right
    small, large = Finding(0.2, 0.1), Finding(0.5, 1.0)
    assert worst(large, small) is small and worst(large, Finding(0.0, 0.0)) is not small


def test_checks_are_drawn_anew_and_whatever_raises_is_wrong() -> None:
    drawn: list[float] = []

    def counts() -> Finding:
        drawn.append(float(torch.rand(())))
        return Finding(0.0, 0.0)

    def raises() -> Finding:
        raise RuntimeError("no such instruction\nmore")

    def infinite() -> Finding:
        return Finding(float("inf"), 1.0)

    cases = [Case(("a",), "a", counts), Case(("b",), "b", raises), Case(("c",), "c", infinite)]
    found = run_cases(cases, seconds=60, seed=1, draws=3)
    assert len(set(drawn)) == 3
    assert [one["status"] for one in found] == ["right", "error", "wrong"]
    assert found[1]["reason"] == "RuntimeError: no such instruction"
    assert found[2]["error"] is None
    late = run_cases(cases, seconds=0, seed=1)
    assert {one["status"] for one in late} == {"not run"}
    shown = "\n".join(lines(found, states(found), dry_run=True))
    assert "1 of 3 checks right" in shown and "proves nothing" in shown and "proven" not in shown


def test_memory_is_poisoned_while_checks_run() -> None:
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
        assert (torch.empty(10, dtype=torch.int8) == 127).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_kernel_that_an_engine_may_use_is_checked() -> None:
    spoken_for = {name for case in every_case(CPU, dry_run=True) for name in case.kernels}
    asked_for = {row.kernel for row in TABLE if row.own} - CUDA_KERNELS
    if not multiplies_fp8_rows():
        asked_for.remove("fp8_scaled_mm")
    asked_for |= {"rope_append", "decode_attention", "window_attention", "prefill_attention"}
    assert asked_for | {"quantize_rows"} <= spoken_for


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    prove_command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_a_dry_run_writes_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases(device: torch.device, *, dry_run: bool) -> list[Case]:
        found = every_case(device, dry_run=dry_run)
        return [case for case in found if case.kernels in (("greedy",), ("rope_append",))][:3]

    monkeypatch.setattr(session, "every_case", cases)
    assert prove_command.run(parse("--dry-run", "--out", str(tmp_path))) == 0
    assert [path.name for path in tmp_path.iterdir()] == [prove_command.RESULTS]
    written = json.loads((tmp_path / prove_command.RESULTS).read_text())
    assert written["dry_run"] is True and len(written["checks"]) == 3
    printed = capsys.readouterr()
    assert "DRY RUN" in printed.err and json.loads(printed.out)["checks"] == 3


def test_nothing_is_proven_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is proven on a CPU"):
        prove_command.run(parse("--device", "cpu", "--out", str(tmp_path)))
