"""The targets: floors from the shape, verdicts from figures, and dry runs that look like none."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmr5_bench import targets_command
from mmr5_bench.random_weights.engine_folder import write_random_engine
from mmr5_bench.random_weights.shapes import formats_of, spec_of, stored_bytes
from mmr5_bench.targets import session as sessions
from mmr5_bench.targets.configurations import ALL, CUDA, PORTABLE, TRITON, choose
from mmr5_bench.targets.goals import GOALS, goal
from mmr5_bench.targets.kernel_goals import figures_of
from mmr5_bench.targets.results import DRY, RANDOM, best_of, figure, markdown, number, table
from mmr5_bench.targets.session import Session, run_targets
from mmr5_bench.targets.work import ModelWork, Part, floor_ms
from mmr5_export import export
from mmr5_export.options import ExportOptions
from mmr5_runtime import Reranker
from mmr5_runtime.onnx.files import BACKEND as ONNXRUNTIME

CPU = torch.device("cpu")
STATED = {
    "memory_bytes_per_s": 4.3e12,
    "matmul_flops": {"bfloat16": 790e12, "int8": 1580e12, "fp8": 1580e12},
}


def work(**options: Any) -> ModelWork:
    return ModelWork(spec_of("7b"), formats_of("7b", "int4"), **options)


def test_floors_are_those_of_the_plan() -> None:
    plain, eight = work(), work(prefill="fp8")
    up = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    assert 1e3 * floor_ms([plain.linear(up, 1)], STATED) == pytest.approx(16.3, rel=0.01)
    down = plain.linear(["model.layers.0.mlp.down_proj"], 1)
    assert 1e3 * floor_ms([down], STATED) == pytest.approx(8.1, rel=0.01)
    assert 1e3 * floor_ms(plain.decode_attention(4096), STATED) == pytest.approx(1.95, rel=0.01)
    assert 1e3 * floor_ms(plain.decode_attention(16384), STATED) == pytest.approx(7.8, rel=0.01)
    assert floor_ms(eight.prefill_tokens(13220), STATED) == pytest.approx(154, rel=0.01)
    assert floor_ms(plain.prefill_tokens(13220), STATED) == pytest.approx(263, rel=0.01)
    # Ten pages of 64 x 80 patches in bf16.
    assert 10 * floor_ms(plain.vision(64, 80), STATED) == pytest.approx(90.7, rel=0.02)
    weights = floor_ms(plain.decode_step(0), STATED)
    assert weights == pytest.approx(0.909, rel=0.01)
    keys = floor_ms(plain.decode_step(8192), STATED) - weights
    assert keys == pytest.approx(8192 * 57344 / 4.3e9, rel=0.01)
    coded = work(kv="int8")
    assert floor_ms(coded.decode_step(8192), STATED) - weights == pytest.approx(keys / 2, rel=0.05)


def test_a_floor_is_a_sum_over_parts_and_knows_every_rate() -> None:
    rates = {"memory_bytes_per_s": 1e9, "matmul_flops": {"bfloat16": 1e9}}
    parts = [Part(2e6, 1e6), Part(1e6, 5e6)]
    assert floor_ms(parts, rates) == pytest.approx(2.0 + 5.0)
    assert floor_ms([Part(0, 1e6, "fp8")], rates) == pytest.approx(1.0)
    assert floor_ms([parts[0].times(3)], rates) == pytest.approx(6.0)
    cold = work().rerank([(44, 56)] * 2, 1000, 10, seen=False)
    seen = work().rerank([(44, 56)] * 2, 1000, 10, seen=True)
    assert floor_ms(cold, STATED) - floor_ms(seen, STATED) == pytest.approx(
        2 * floor_ms(work().vision(44, 56), STATED)
    )


def test_every_goal_of_the_plan_is_there_once() -> None:
    assert len({one.key for one in GOALS}) == len(GOALS) == 13
    assert goal("decode-step").met_by(1.35) and not goal("decode-step").met_by(1.36)
    assert goal("against-transformers").met_by(8.0)
    assert not goal("against-transformers").met_by(7.9)
    assert goal("gate-up").better(0.8, 0.7) and goal("memory").better(11.0, 12.0)


def test_the_table_of_a_real_run_says_met_and_missed() -> None:
    figures = [
        figure("decode-step", "portable", [30.0, 31.0, 50.0], dry_run=False, floor=1.0),
        figure("decode-step", "triton", [1.2, 1.3, 9.0], dry_run=False, floor=1.0),
        figure("against-transformers", "triton", [7.0], dry_run=False),
    ]
    assert figures[0]["value"] == 31.0 and figures[0]["met"] is False
    assert figures[1]["met"] is True and figures[1]["share"] == pytest.approx(1 / 1.3)
    best = best_of(figures, "decode-step")
    assert best is figures[1] and best_of(figures, "memory") is None
    missing = [{"goal": "memory", "configuration": "triton", "reason": "no GPU"}]
    text = table(figures, missing, dry_run=False)  # type: ignore[arg-type]
    assert text.startswith(RANDOM) and text.endswith(RANDOM) and DRY not in text
    lines = text.splitlines()
    (step,) = (line for line in lines if line.startswith("decode step"))
    assert "met" in step and "1.30 ms" in step and step.endswith("triton") and "77%" in step
    assert "MISSED" in lines[lines.index(step) + 1]
    assert "not measured: memory by triton: no GPU" in text
    assert RANDOM in markdown(figures, dry_run=False)
    assert "| not measured |" in markdown(figures, dry_run=False)
    with pytest.raises(ValueError, match="no samples"):
        figure("memory", "triton", [], dry_run=False)


def test_nothing_of_a_dry_run_can_be_taken_for_a_figure() -> None:
    dry = [figure("decode-step", "triton", [1.0], dry_run=True, floor=1.0)]
    assert dry[0]["met"] is None and dry[0]["dry_run"] is True
    for text in (table(dry, [], dry_run=True), markdown(dry, dry_run=True)):
        assert DRY in text and "dry run" in text.replace(DRY, "")
        assert " met" not in text and "MISSED" not in text


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(1.2345, "ms", "1.23 ms"), (154.2, "ms", "154 ms"), (0.75, "of copy", "75% of copy")],
)
def test_numbers_have_three_digits(value: float, unit: str, shown: str) -> None:
    assert number(value, unit) == shown


def test_configurations_have_names_and_reasons() -> None:
    assert len({one.name for one in ALL}) == len(ALL)
    assert TRITON.name == "triton"
    assert replace(TRITON, kv="int8", graphs=False).name == "triton, kv int8, no graphs"
    assert choose([]) == ALL and choose(["portable"]) == (PORTABLE,)
    assert set(choose(["triton"])) == {one for one in ALL if one.kernels == "triton"}
    with pytest.raises(ValueError, match="no configuration 'cutlass'"):
        choose(["cutlass"])
    assert PORTABLE.why_not(CPU) is None
    assert "records no graphs" in (replace(TRITON, graphs=False).why_not(CPU) or "")
    assert CUDA.why_not(CPU) is not None
    assert PORTABLE.options(CPU)["target"] is None
    assert TRITON.options(torch.device("cuda")) == {
        "kernels": "triton",
        "graphs": True,
        "prefill": "exact",
        "kv": "bf16",
    }


def kernel_row(op: str, kernel: str, shape: list[int], **other: Any) -> dict[str, Any]:
    return {
        "op": op,
        "format": "int4" if op.startswith("decoder") else "bf16 kv",
        "kernel": kernel,
        "origin": "ours",
        "status": "ok",
        "shape": shape,
        "ms": {"value": 0.02},
        "p95_ms": {"value": 0.03},
        "floor_ms": 0.01,
        "copy_share": 0.8,
        "method": "graph",
        **other,
    }


def test_figures_of_single_kernels() -> None:
    rows = [
        kernel_row("decoder.gate_up", "int4_skinny", [1, 2, 3]),
        kernel_row("decoder.gate_up", "vllm marlin", [1, 2, 3], origin="library", copy_share=0.4),
        kernel_row("decoder.down", "int4_skinny", [1, 2, 3], status="failed", reason="wrong"),
        kernel_row("attention.decode", "decode_attention", [1, 4097, 9]),
        kernel_row("attention.decode", "decode_attention", [8, 4104, 9]),
    ]
    figures, missing = figures_of(rows, dry_run=False)
    found = {(one["goal"], one["configuration"]): one for one in figures}
    assert found["gate-up", "int4_skinny"]["met"] is True
    assert found["gate-up", "vllm marlin (library)"]["met"] is False
    step = found["attention-4k", "decode_attention, bf16 kv"]
    assert step["value"] == 20.0 and step["floor"] == 10.0 and step["met"] is False
    assert len(figures) == 3
    best = best_of(figures, "gate-up")
    assert best is not None and best["configuration"] == "int4_skinny"
    others = [one for one in figures if one["goal"] == "gate-up" and one.get("library")]
    assert best_of(others, "gate-up") is None  # a library's kernel meets no target of ours
    reasons = {one["goal"]: one["reason"] for one in missing}
    assert reasons["down"] == "wrong" and "16384 keys" in reasons["attention-16k"]


def session(tmp_path: Path, seconds: float) -> Session:
    said: list[str] = []
    ends = time.monotonic() + seconds
    return Session("tiny", CPU, tmp_path / "t.json", ends, said.append)


def test_what_cannot_be_measured_is_listed_and_the_run_goes_on(tmp_path: Path) -> None:
    run = session(tmp_path, 60)

    def fails() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access\nsecond line")

    assert run.attempt("memory", "triton", fails) is None
    kept = run.attempt("memory", "portable", lambda: figure("memory", "x", [1.0], dry_run=True))
    assert kept is not None
    late = session(tmp_path, 0)
    late.missing = run.missing
    assert late.attempt("import", "portable", fails) is None
    written = json.loads((tmp_path / "t.json").read_text())
    reasons = {one["configuration"]: one["reason"] for one in written["missing"]}
    assert reasons["triton"] == "RuntimeError: CUDA error: an illegal memory access"
    assert reasons["portable"] == "the time of the whole run was over"


def test_a_dry_run_of_the_portable_engine_measures_whole_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Single kernels and new processes have tests of their own, and take their time.
    monkeypatch.setattr(sessions, "_kernels", lambda run: None)
    monkeypatch.setattr(sessions, "_first_rerank", lambda run, configurations: None)
    document = run_targets("tiny", CPU, [PORTABLE], tmp_path / "t.json", seconds=60)
    found = {one["goal"]: one for one in document["figures"]}
    expected = {"decode-step", "rerank-cold", "rerank-seen", "prefill-13k", "vision-20"}
    assert set(found) == expected | {"against-transformers"}, document["missing"]
    assert document["dry_run"] is True and document["note"] == DRY
    assert all(one["dry_run"] and one["met"] is None for one in document["figures"])
    assert found["rerank-cold"]["details"]["stages_ms"]["decode"] >= 0
    assert found["against-transformers"]["details"]["transformers_s"] > 0
    assert json.loads((tmp_path / "t.json").read_text()) == document


def test_an_engine_folder_of_random_weights_can_be_loaded(tmp_path: Path) -> None:
    folder = write_random_engine(tmp_path / "engine", "tiny", "int4")
    assert sum(path.stat().st_size for path in folder.iterdir()) > stored_bytes("tiny", "int4")
    with Reranker.load(folder, "cpu", verify_hashes=True) as reranker:
        assert reranker.info.context == 65536


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    targets_command.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cpu"), "needs a GPU"),
        (("--dry-run", "--seconds", "0"), "leaves no time"),
        (("--dry-run", "--configuration", "cutlass"), "no configuration"),
    ],
)
def test_commands_that_measure_nothing_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        targets_command.run(parse(*arguments, "-o", str(tmp_path / "t.json")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["native", "onnxruntime"])
def test_the_way_to_the_first_rerank_of_either_engine(tmp_path: Path, backend: str) -> None:
    engine, written = tmp_path / "engine", tmp_path / "first.json"
    export("mini", None, engine, ExportOptions(method="rtn", verify=False, backend=(ONNXRUNTIME,)))
    command = [sys.executable, "-m", "mmr5_bench.targets.first_rerank", str(engine)]
    command += ["--backend", backend, "--pages", "2", "--written", "2", "-o", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(written.read_bytes())
    assert json.loads(done.stdout.splitlines()[-1]).items() <= found.items()
    assert (found["source"], found["backend"], found["layers"]) == ("mini", backend, 4)
    assert found["total_s"] == pytest.approx(found["load_s"] + found["first_s"])
    if Path("/proc/self/status").exists():
        assert 0 < found["loaded_peak_bytes"] <= found["peak_bytes"]
