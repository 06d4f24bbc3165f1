"""The kernel benchmark: right kernels are timed, wrong ones are not, and no row is lost."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmr5_bench import kernels_command
from mmr5_bench.evidence.document import load_evidence
from mmr5_bench.kernels_bench import FORMAT_NAMES
from mmr5_bench.kernels_bench.attention import attention_workload
from mmr5_bench.kernels_bench.linears import Linears
from mmr5_bench.kernels_bench.operands import FORMATS, deviation, random_tensors
from mmr5_bench.kernels_bench.session import KernelOptions, run_kernels
from mmr5_bench.kernels_bench.shapes import MOST_HEAD_ROWS, OPS, linear_shape, load_shapes, rows_of
from mmr5_bench.kernels_bench.timing import (
    Budget,
    BudgetSpentError,
    Stopwatch,
    alternate,
    copies_needed,
)
from mmr5_bench.kernels_bench.workload import best_ceilings, floor_ms, usable_rates, with_floor
from mmr5_kernels import dispatch
from mmr5_kernels.dispatch import Prepared
from mmr5_kernels.layout import INT4
from mmr5_kernels.target import Target

CPU = torch.device("cpu")
QKV = ("decoder.qkv",)


class Ticking:
    """A clock that moves on by a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_every_format_is_timed_in_both_dtypes(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    for dtype in (torch.float32, torch.bfloat16):
        options = KernelOptions(
            "tiny", dtype=dtype, m=(1, 17), ops=(*QKV, "vision.qkv"), libraries=False
        )
        run_kernels(options, output)
        document = load_evidence(output)
        timed = Counter((row["op"], row["format"]) for row in document["kernels"])
        assert {name for op, name in timed if op == "decoder.qkv"} == set(FORMAT_NAMES)
        assert all(timed["decoder.qkv", name] == 2 for name in FORMAT_NAMES)
        assert {name for op, name in timed if op == "vision.qkv"} == {
            "bf16",
            "int8",
            "int8-weight-only",
            "fp8",
        }
        assert {row["subject"] for row in document["skipped"]} == {
            f"vision {name}" for name in FORMAT_NAMES if "int4" in name or "g128" in name
        }
        for row in document["kernels"]:
            check_row(row)
        by_kernel = {row["kernel"] for row in document["kernels"] if row["format"] == "int4"}
        assert by_kernel == {"int4_pack" if dtype == torch.bfloat16 else "weight_only_rows"}


def check_row(row: dict[str, Any]) -> None:
    assert row["status"] == "ok", row
    for key in ("ms", "p95_ms", "dense_ms", "ratio"):
        assert 0 < row[key]["low"] <= row[key]["value"] <= row[key]["high"], (key, row)
    assert row["p95_ms"]["value"] >= row["ms"]["value"]
    assert (
        row["bytes"] > 0
        and row["flops"] == 2 * row["shape"][0] * row["shape"][1] * (row["shape"][2])
    )
    assert row["floor_ms"] > 0
    assert row["share"] == pytest.approx(row["floor_ms"] / row["ms"]["value"])
    assert row["ratio"]["value"] == pytest.approx(row["ms"]["value"] / row["dense_ms"]["value"])


def test_attention_is_timed_as_the_decoder_runs_it(tmp_path: Path) -> None:
    document = run_kernels(KernelOptions("tiny", ops=("attention",)), tmp_path / "a.json")
    shapes = load_shapes("tiny")
    assert [(row["op"], row["shape"]) for row in document["kernels"]] == [
        ("attention.decode", [1, 41, 256]),
        ("attention.prefill", [48, 48, 256]),
    ]
    assert all(row["status"] == "ok" for row in document["kernels"])
    step = attention_workload(shapes, 1, 40, torch.float32, CPU, 1 << 16)
    # 41 keys and values of one head of 128, a query and an output of 256, 4 bytes each.
    assert step.nbytes == 4 * (2 * 41 * 128 + 2 * 256)
    assert step.flops == 4 * 256 * 41
    prompt = attention_workload(shapes, 48, 0, torch.float32, CPU, 1 << 16)
    assert prompt.flops == 4 * 256 * (48 * 49 // 2)


def test_bytes_and_floor_of_one_linear_by_hand() -> None:
    shapes = load_shapes("tiny")
    op = OPS[0]
    n, k = linear_shape(shapes.spec, op, INT4)
    assert (n, k) == (256 + 2 * 128, 256)  # 2 heads and 1 key head of 128
    linears = Linears(shapes, CPU, torch.float32, 1 << 16, [Target("cpu")])
    workload = linears.workload(op, "int4", 4)
    packed, scales, bias = n * k // 2, 2 * n * (k // 128), 4 * n
    assert workload.nbytes == packed + scales + bias + 4 * (4 * k) + 4 * (4 * n)
    assert workload.shape == (4, 512, 256)
    rates = {"memory_bytes_per_s": 1e9, "matmul_flops": {"float32": 1e9, "int8": 4e9}}
    assert floor_ms(2_000_000, 1_000_000, ("float32",), rates) == (2.0, "memory")
    assert floor_ms(2_000_000, 8_000_000, ("float32",), rates) == (8.0, "compute")
    # A product of codes is bounded by the fastest it can be done with.
    assert floor_ms(1_000_000, 8_000_000, ("float32", "int8"), rates) == (2.0, "compute")
    with pytest.raises(ValueError, match="no matmul ceiling of bfloat16"):
        floor_ms(1, 1, ("bfloat16",), rates)


def test_a_kernel_is_bounded_by_the_fastest_arithmetic_it_may_use() -> None:
    assert usable_rates(torch.bfloat16, "int8") == ("int8", "bfloat16", "float32")
    assert usable_rates(torch.float32, None) == ("float32",)
    busy = {"memory_bytes_per_s": 1e9, "matmul_flops": {"float32": 8e9, "bfloat16": 1e9}}
    calm = {"memory_bytes_per_s": 2e9, "matmul_flops": {"float32": 4e9, "bfloat16": 2e9}}
    best = best_ceilings({**busy, "dry_run": False}, {**calm, "dry_run": False})
    assert best == {
        "memory_bytes_per_s": 2e9,
        "matmul_flops": {"float32": 8e9, "bfloat16": 2e9},
        "dry_run": False,
    }
    row = {"bytes": 4_000_000, "flops": 8_000, "rates": ["float32"], "ms": {"value": 8.0}}
    assert with_floor(row, busy)["share"] == 0.5
    assert with_floor(row, {**best, "copy_bytes_per_s": 1e9}) == {
        **row,
        "floor_memory_ms": 2.0,
        "floor_compute_ms": 1e-3,
        "floor_ms": 2.0,
        "bound": "memory",
        "share": 0.25,
        "copy_share": 0.5,
    }


def one_wrong(name: str, prepared: Prepared, x: Tensor) -> Tensor:
    y = dispatch.run(prepared, x).clone()
    if prepared.format is not None:
        y[-1, -1] += 1.0
    return y


def wrong_shape(name: str, prepared: Prepared, x: Tensor) -> Tensor:
    return dispatch.run(prepared, x)[:, :-1]


def not_finite(name: str, prepared: Prepared, x: Tensor) -> Tensor:
    y = dispatch.run(prepared, x).clone()
    y[0, 0] = float("nan")
    return y


@pytest.mark.parametrize("broken", [wrong_shape, not_finite])
def test_a_kernel_without_a_proper_output_fails(broken: Any, tmp_path: Path) -> None:
    options = KernelOptions("tiny", formats=("int8",), m=(1,), ops=QKV, libraries=False)
    (row,) = run_kernels(options, tmp_path / "k.json", run=broken)["kernels"]
    assert row["status"] == "failed" and row["max_error"] is None
    assert json.loads((tmp_path / "k.json").read_text())["kernels"] == [row]


def test_one_wrong_output_fails_and_is_not_timed(tmp_path: Path) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, prepared: Prepared, x: Tensor) -> Tensor:
        calls["dense" if prepared.format is None else "int4"] += 1
        return one_wrong(name, prepared, x)

    options = KernelOptions(
        "tiny", formats=("bf16", "int4"), m=(17,), ops=("decoder.down",), libraries=False
    )
    right, wrong = run_kernels(options, tmp_path / "k.json", run=counted)["kernels"]
    assert right["status"] == "ok" and right["format"] == "bf16"
    assert wrong["status"] == "failed" and "ms" not in wrong
    assert "of its largest output" in wrong["reason"]
    assert wrong["max_error"] > 1e-2
    assert calls["int4"] == 1  # the check; nothing after it
    assert calls["dense"] > 1


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"

    def interrupt(done: int, total: int, row: dict[str, Any] | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    options = KernelOptions(
        "tiny", formats=("bf16", "int8", "fp8"), m=(1,), ops=QKV, libraries=False
    )
    with pytest.raises(KeyboardInterrupt):
        run_kernels(options, output, progress=interrupt)
    assert [row["format"] for row in load_evidence(output)["kernels"]] == ["bf16", "int8"]
    assert list(tmp_path.iterdir()) == [output]


def test_rows_after_the_budget_are_skipped_with_a_reason(tmp_path: Path) -> None:
    # Each look at the clock takes a second, and a row looks often: the first has 100 / 3 seconds.
    plain = KernelOptions(
        "tiny", formats=("bf16", "int8", "fp8"), m=(1,), ops=QKV, libraries=False, seconds=100
    )
    clock = Ticking()
    document = run_kernels(plain, tmp_path / "k.json", clock=clock)
    rows, skipped = document["kernels"], document["skipped"]
    assert len(rows) + len(skipped) == 3
    seconds = clock.now
    assert seconds < 100 + 20  # the looks that found it spent
    starved = replace(plain, formats=("bf16", "int8"), m=(1, 4), seconds=5)
    document = run_kernels(starved, tmp_path / "k.json", clock=Ticking())
    assert document["kernels"] == []
    assert [entry["subject"] for entry in document["skipped"]] == [
        f"decoder.qkv {name} M={m}" for name in ("bf16", "int8") for m in (1, 4)
    ]
    assert all("give more seconds" in entry["reason"] for entry in document["skipped"])


def test_rounds_alternate_and_end_with_the_budget() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            order.append(name)
            return torch.zeros(1)

        return run

    subjects = {"a": [call("a")], "b": [call("b0"), call("b1")]}
    samples = alternate(subjects, Stopwatch(CPU), Budget(1e9), most_rounds=3)
    assert order == ["a", "b0", "a", "b0", "b1", "a", "a", "b0"]
    assert {name: len(one.ms) for name, one in samples.items()} == {"a": 3, "b": 3}
    assert samples["a"].method == "host"
    # One look per untimed call and one per round: the twelfth finds it spent.
    samples = alternate(subjects, Stopwatch(CPU), Budget(12.0, Ticking()), most_rounds=200)
    assert len(samples["a"].ms) == len(samples["b"].ms) == 9
    with pytest.raises(BudgetSpentError, match="before 5 rounds"):
        alternate(subjects, Stopwatch(CPU), Budget(5.0, Ticking()))


def test_shapes_of_7b_are_those_that_run() -> None:
    shapes = load_shapes("7b")
    found = {op.name: linear_shape(shapes.spec, op, None) for op in OPS}
    assert found == {
        "decoder.qkv": (3584 + 2 * 512, 3584),
        "decoder.o_proj": (3584, 3584),
        "decoder.gate_up": (2 * 18944, 3584),
        "decoder.down": (3584, 18944),
        "lm_head": (152064, 3584),
        "vision.qkv": (3840, 1280),
        "vision.proj": (1280, 1280),
        "vision.gate_up": (6840, 1280),
        "vision.down": (1280, 3420),
        "merger.in": (5120, 5120),
        "merger.out": (3584, 5120),
    }
    by_name = {op.name: op for op in OPS}
    assert linear_shape(shapes.spec, by_name["vision.down"], FORMATS["int8"]) == (1280, 3424)
    with pytest.raises(ValueError, match="no groups"):
        linear_shape(shapes.spec, by_name["merger.in"], INT4)
    assert rows_of(shapes, by_name["vision.qkv"], (1, 8)) == (5120,)
    assert rows_of(shapes, by_name["merger.in"], (1, 8)) == (1280,)
    assert rows_of(shapes, by_name["lm_head"], (1, 8, MOST_HEAD_ROWS + 1)) == (1, 8)


def test_mini_has_a_head_of_its_own_though_it_shares_embeddings() -> None:
    shapes = load_shapes("mini")
    head = next(op for op in OPS if op.name == "lm_head")
    assert linear_shape(shapes.spec, head, None) == linear_shape(shapes.spec, head, INT4)
    assert linear_shape(shapes.spec, head, None) == (1024, 256)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_random_tensors_are_those_of_the_format(name: str) -> None:
    format = FORMATS[name]
    tensors = random_tensors(format, 48, 256, bias=True, device=CPU)
    assert tensors.pop("bias").shape == (48,)
    if format is None:
        assert tensors["weight"].dtype == torch.bfloat16
    else:
        wanted = {s: spec for s, spec in format.tensors(48, 256).items() if s != "weight_shape"}
        assert {s: (tuple(t.shape), t.dtype) for s, t in tensors.items()} == wanted
    weight = tensors.get("weight", tensors.get("weight_packed"))
    assert weight is not None
    assert len({bytes(row.contiguous().view(torch.uint8).tolist()) for row in weight}) == 48


@given(st.integers(1, 1 << 33), st.integers(1, 1 << 30))
def test_copies_are_larger_than_the_cache_unless_memory_is_bounded(nbytes: int, cache: int) -> None:
    copies = copies_needed(nbytes, cache)
    assert 1 <= copies <= 32
    if copies < 32 and (copies + 1) * nbytes <= 4 << 30:
        assert copies * nbytes >= 2 * cache


def test_deviation_is_relative_to_the_output() -> None:
    wanted = torch.tensor([[3.0, 4.0]])
    found = deviation(wanted + torch.tensor([[0.0, 0.4]]), wanted)
    assert found.largest == pytest.approx(0.1) and found.rms == pytest.approx(0.08)
    assert deviation(torch.zeros(1, 2), torch.zeros(1, 2)).largest == 0
    assert deviation(wanted.double(), wanted).largest == float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ("int5",)}, "int5"),
        ({"m": (0,)}, "rows count from 1"),
        ({"m": ()}, "need a value"),
        ({"seconds": 0.0}, "leaves no time"),
        ({"dtype": torch.float16}, "float16"),
        ({"ops": ("encoder",)}, "encoder"),
    ],
)
def test_options_that_measure_nothing_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelOptions("tiny", **options)


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="'3b' are unknown"):
        load_shapes("3b")


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernels_command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_command_ends_with_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "k.json"
    fixed = ("--shapes", "tiny", "--op", *QKV, "--format", "int8", "--m", "1", "4")
    assert kernels_command.run(parse(*fixed, "--no-libraries", "-o", str(output))) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert summary["kernels"] == 2 and summary["failed"] == []
    assert "int8_blocks" in printed.err
    document = load_evidence(output)
    assert len(document["kernels"]) == 2
    assert "dry run" in document["title"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="--device cuda: torch sees no CUDA device"):
        kernels_command.run(parse("--device", "cuda", "-o", "k.json"))


def test_commands_are_light_to_import() -> None:
    code = (
        "import sys, mmr5_bench.kernels_command, mmr5_bench.mteb_command; "
        "print({'torch', 'mteb', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
