"""Other libraries' kernels: fed with our weights, skipped with a reason, and the rule of 1.4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmr5_bench.evidence.document import load_evidence
from mmr5_bench.kernels_bench import session
from mmr5_bench.kernels_bench.libraries.base import Case, Library, RunRows
from mmr5_bench.kernels_bench.libraries.every import every_library
from mmr5_bench.kernels_bench.libraries.torch_kernels import IntMm, Tinygemm
from mmr5_bench.kernels_bench.libraries.vllm_kernels import (
    UINT4B8,
    UINT8B128,
    gptq_words,
    load_library,
    marlin_scales,
    permuted,
)
from mmr5_bench.kernels_bench.operands import (
    FORMATS,
    TOLERANCES,
    deviation,
    random_tensors,
    reference_linear,
)
from mmr5_bench.kernels_bench.session import KernelOptions, run_kernels
from mmr5_bench.kernels_bench.table import DRY, kernels_table
from mmr5_bench.kernels_bench.verdict import KEEP_SHAPES, keep_verdict, verdict_lines
from mmr5_kernels.dispatch import Prepared
from mmr5_kernels.layout import Format, unpack_int4

CPU = torch.device("cpu")
QKV = ("decoder.qkv",)


def case(format_name: str, n: int = 64, k: int = 256, dtype: torch.dtype = torch.bfloat16) -> Case:
    tensors = random_tensors(FORMATS[format_name], n, k, bias=True, device=CPU)
    return Case(FORMATS[format_name], tensors, dtype, CPU, n, k)


@pytest.mark.parametrize("format_name", ["int4", "int4-g32", "int4-asymmetric"])
def test_tinygemm_multiplies_our_codes(format_name: str) -> None:
    given = case(format_name)
    x = torch.randn(5, given.k).bfloat16()
    assert Tinygemm().serves(given.format) and Tinygemm().why_not(given, 5) is None
    found = Tinygemm().prepare(given)(x)
    off = deviation(found, reference_linear(x, given.format, given.tensors))
    assert off.rms <= TOLERANCES[torch.bfloat16].rms
    assert "256 rows" in (Tinygemm().why_not(given, 257) or "")


def test_torchs_own_int8_product_is_the_references() -> None:
    given = case("int8", dtype=torch.float32)
    x = torch.randn(20, given.k)
    found = IntMm().prepare(given)(x)
    assert torch.equal(found, reference_linear(x, given.format, given.tensors))
    assert "more than 16" in (IntMm().why_not(given, 16) or "")
    assert not IntMm().serves(FORMATS["int4"])


def test_what_cannot_take_part_says_why() -> None:
    for library in every_library(None):
        for name, format in FORMATS.items():
            if not library.serves(format):
                continue
            reason = library.why_not(case(name, 128), 32)
            on_cpu = library.name in ("tinygemm", "torch._int_mm")
            assert (reason is None) == on_cpu, (library.name, name, reason)
            assert on_cpu or "needs a CUDA device" in (reason or "")


def test_a_library_that_is_missing_or_no_library_is_named(tmp_path: Path) -> None:
    assert "--vllm-library" in (load_library(None) or "")
    wrong = tmp_path / "_C_stable_libtorch.abi3.so"
    wrong.write_bytes(b"no library")
    assert "_C_stable_libtorch.abi3.so cannot be loaded" in (load_library(wrong) or "")


def test_numbers_of_vllms_types() -> None:
    # Printed by vllm.scalar_type of version 0.26.0.
    assert (UINT4B8, UINT8B128) == (1125899907892224, 1125899923621888)


def test_words_for_gptq_hold_neighbouring_columns() -> None:
    four = case("int4", 64, 128)
    words = gptq_words(four)
    codes = unpack_int4(four.tensors["weight_packed"])
    assert words.shape == (16, 64) and words.is_contiguous()
    for place in range(8):
        assert torch.equal((words[3] >> 4 * place & 15) - 8, codes[:, 24 + place].to(torch.int32))
    eight = case("int8-weight-only", 64, 128)
    words = gptq_words(eight)
    assert words.shape == (32, 64)
    stored = words.t().contiguous().view(torch.uint8).view(64, 128).to(torch.int16) - 128
    assert torch.equal(stored.to(torch.int8), eight.tensors["weight"])


def test_marlins_scales_are_a_permutation_in_runs() -> None:
    scale = torch.arange(128.0)[:, None].expand(128, 2).contiguous()
    grouped = marlin_scales(scale, 128, 256)
    assert grouped.shape == (2, 128) and grouped.is_contiguous()
    assert grouped[0, :10].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9]
    assert grouped[1, 64:66].tolist() == [64, 72]
    rows = marlin_scales(scale[:, :1], -1, 256)
    assert rows[0, :9].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2]
    assert sorted(rows[0].tolist()) == list(range(128))
    assert permuted(torch.arange(4.0)[None], (3, 1, 2, 0)).tolist() == [[3, 1, 2, 0]]


class Refusing(Library):
    """It looks as if it could, and raises when it is called."""

    name = "refusing"

    def why_not(self, case: Case, m: int) -> str | None:
        return None

    def prepare(self, case: Case) -> RunRows:
        def run(x: Tensor) -> Tensor:
            raise KeyError("no such kernel")

        return run


class Wrong(Library):
    """It gives zeros."""

    name = "wrong"

    def why_not(self, case: Case, m: int) -> str | None:
        return None

    def serves(self, format: Format | None) -> bool:
        return format is not None

    def prepare(self, case: Case) -> RunRows:
        return lambda x: torch.zeros(x.shape[0], case.n, dtype=x.dtype)


def test_a_library_that_fails_is_skipped_or_marked_and_ours_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Callable[[Path | None], tuple[Library, ...]] = lambda vllm: (Refusing(), Wrong())  # noqa: E731
    monkeypatch.setattr(session, "every_library", made)
    options = KernelOptions("tiny", formats=("int4",), m=(1, 4), ops=QKV)
    run_kernels(options, tmp_path / "k.json")
    document = load_evidence(tmp_path / "k.json")
    ours = [row for row in document["kernels"] if row["origin"] == "ours"]
    assert [row["status"] for row in ours] == ["ok", "ok"] and all(row["chosen"] for row in ours)
    wrong = [row for row in document["kernels"] if row["kernel"] == "wrong"]
    assert [row["status"] for row in wrong] == ["failed", "failed"]
    assert all("ms" not in row for row in wrong)
    assert document["skipped"] == [
        {"subject": "refusing", "reason": "KeyError: 'no such kernel'"}  # once for both
    ]
    text = kernels_table(document["kernels"], dry_run=True)
    assert text.startswith(DRY) and text.endswith(DRY)


def test_a_kernel_of_ours_that_raises_fails_and_the_next_goes_on(tmp_path: Path) -> None:
    def run(name: str, prepared: Prepared, x: Tensor) -> Tensor:
        raise RuntimeError("out of resource: shared memory\nmore")

    options = KernelOptions("tiny", formats=("int8",), m=(1, 4), ops=QKV, libraries=False)
    rows = run_kernels(options, tmp_path / "k.json", run=run)["kernels"]
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert rows[0]["reason"] == "RuntimeError: out of resource: shared memory"
    assert "failed" in kernels_table(rows)


def row(op: str, kernel: str, ms: float, origin: str = "ours", **other: Any) -> dict[str, Any]:
    return {
        "op": op,
        "format": "int4",
        "kernel": kernel,
        "origin": origin,
        "status": "ok",
        "shape": [1, 10, 10],
        "ms": {"value": ms},
        "dense_ms": {"value": 10.0},
        **other,
    }


def rows(ours: float, rival: float, rival_name: str = "vllm marlin") -> list[dict[str, Any]]:
    found = []
    for op in KEEP_SHAPES:
        found += [row(op, "int4_skinny", ours), row(op, "int4_expand", 3 * ours)]
        found += [row(op, rival_name, rival, "library")]
    return found


def test_our_kernel_stays_where_it_is_fast_enough_on_all_shapes() -> None:
    kept = keep_verdict(rows(1.0, 1.4), dry_run=False)
    assert kept["decision"] == "kept"
    assert {duel["ours"] for duel in kept["duels"]} == {"int4_skinny"}
    slower = rows(1.0, 1.4)
    slower[2]["ms"] = {"value": 1.39}
    beaten = keep_verdict(slower, dry_run=False)
    assert beaten["decision"] == "not kept" and "decoder.qkv" in beaten["reason"]
    assert beaten["duels"][0]["factor"] == pytest.approx(1.39)
    # A dense product is a library's as well.
    dense = [{**one, "dense_ms": {"value": 1.2}} for one in rows(1.0, 5.0)]
    assert keep_verdict(dense, dry_run=False)["decision"] == "not kept"


def test_nothing_is_decided_without_rivals_or_by_a_dry_run() -> None:
    alone = keep_verdict(rows(1.0, 9.0, "tinygemm"), dry_run=False)
    assert alone["decision"] == "undecided" and "humming" in alone["reason"]
    assert keep_verdict([], dry_run=False)["decision"] == "undecided"
    failed = [{**one, "status": "failed"} for one in rows(1.0, 9.0) if one["origin"] == "library"]
    mine = [one for one in rows(1.0, 9.0) if one["origin"] == "ours"]
    assert keep_verdict([*mine, *failed], dry_run=False)["decision"] == "undecided"
    dry = keep_verdict(rows(1.0, 9.0), dry_run=True)
    assert dry["decision"] == "undecided"
    assert verdict_lines(dry)[0].startswith("DRY RUN, no figures.")
    several = [{**one, "shape": [4, 10, 10]} for one in rows(1.0, 9.0)]  # the rule is for one row
    assert keep_verdict(several, dry_run=False)["decision"] == "undecided"
