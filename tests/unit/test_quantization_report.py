"""Rows, labels and the table of the quantization benchmark on made-up outcomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmr5_bench.minidocs.lists import PageKey, RerankCase
from mmr5_bench.outcomes import Key, Outcome
from mmr5_bench.quantization import Contender
from mmr5_bench.quantization_report import label, metrics, quantization_table, rows
from mmr5_bench.readme import table_of
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_runtime.manifest import FileEntry, Manifest, Quant

DOWN, HEAD, TOWER = "model.layers.0.mlp.down_proj", "lm_head", "visual.blocks.0.attn.qkv"


def _case(gold: int) -> RerankCase:
    pages = tuple(PageKey(topic=i, kind=0, seed=i) for i in range(3))
    return RerankCase("q", 0, 0, pages, tuple(2 if i == gold else 0 for i in range(3)))


def _outcome(order: tuple[int, ...], kl: float = 0.0, agreeing: int = 10) -> Outcome:
    status = "repaired" if order == (2, 1, 0) else "ok"
    return Outcome(order, status, "eos", 10, 10, kl, 1.0, 1.0 + kl, agreeing)  # type: ignore[arg-type]


CASES = [_case(0), _case(1), _case(2), _case(0)]
REFERENCE = [_outcome(o) for o in ((0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 0, 2))]
OWN = [
    _outcome((0, 1, 2), 0.1, 10),
    _outcome((1, 2, 0), 0.2, 9),
    _outcome((2, 1, 0), 0.3, 8),
    _outcome((0, 1, 2), 0.0, 10),
]


def test_metrics_by_hand() -> None:
    found = metrics(CASES, OWN, REFERENCE)
    assert found["kl"]["value"] == pytest.approx(0.6 / 40)
    assert found["next_token"]["value"] == 37 / 40
    assert found["first_choice"]["value"] == 0.75
    assert found["order"]["value"] == 0.25
    assert found["well_formed"]["value"] == 0.75
    assert found["recall@1"]["value"] == 1.0
    assert found["recall@1"]["difference"]["value"] == 0.25
    assert found["recall@3"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert all(m["low"] <= m["value"] <= m["high"] for m in found.values())


def _manifest(name: str, method: str, layers: dict[str, Format], sqnr: float | None) -> Manifest:
    any_field: Any = None
    return Manifest(
        created_by={},
        source=any_field,
        spec=any_field,
        quant=Quant(name, method, layers),
        template=any_field,
        pixel_budget=any_field,
        image=any_field,
        files={"w": FileEntry("0" * 64, 2_000_000), "tokenizer.json": FileEntry("0" * 64, 7)},
        tensors={"a": "w", "b": "w"},
        report={"sqnr_db": dict.fromkeys(layers, sqnr)},
    )


@pytest.mark.parametrize(
    ("name", "method", "layers", "expected"),
    [
        ("bf16", "none", {}, "bf16"),
        ("int4", "gptq", {DOWN: INT4, HEAD: INT8_WEIGHT_ONLY}, "int4 gptq"),
        ("int4", "rtn", {DOWN: Format("int4", 32, False), HEAD: INT8}, "int4 rtn g32 asym"),
        ("int4", "awq", {DOWN: INT4}, "int4 awq head bf16"),
        ("int4", "awq", {DOWN: INT4, HEAD: INT4}, "int4 awq head int4"),
        ("int8", "rtn", {DOWN: INT8, HEAD: INT8, TOWER: FP8}, "int8 rtn vision fp8"),
    ],
)
def test_labels(name: str, method: str, layers: dict[str, Format], expected: str) -> None:
    assert label(_manifest(name, method, layers, 20.0)) == expected


def _contender(key: str, manifest: Manifest) -> Contender:
    return Contender(Path(f"engines/{key}"), key, "tower", manifest)


def _document() -> dict[str, Any]:
    layers = {DOWN: INT4, HEAD: INT8_WEIGHT_ONLY}
    bf16 = _contender("bf16", _manifest("bf16", "none", {}, None))
    rtn = _contender("rtn", _manifest("int4", "rtn", layers, 19.0))
    gptq = _contender("gptq", _manifest("int4", "gptq", layers, 18.0))
    outcomes: dict[Key, Outcome] = {}
    for index, (reference, own) in enumerate(zip(REFERENCE, OWN, strict=True)):
        outcomes[index, "bf16"] = reference
        outcomes[index, "rtn"] = own
        outcomes[index, "gptq"] = replace(own, kl=own.kl / 2)
    return {
        "kind": "minidocs-quantization",
        "seed": 3,
        "dtype": "float32",
        "cases": 4,
        "list_sizes": [2, 10],
        "provenance": {"commit": "abc1234"},
        "rows": rows(CASES, bf16, [rtn, gptq, bf16], outcomes),
    }


def test_rows_begin_with_the_reference_and_pair_with_rtn() -> None:
    made = _document()["rows"]
    assert [row["engine"] for row in made] == ["bf16", "rtn", "gptq"]
    assert made[0]["sqnr_db"] is None and made[0]["metrics"]["order"]["value"] == 1.0
    assert made[1]["sqnr_db"] == {"median": 19.0, "lowest": 19.0}
    assert made[1]["weights_bytes"] == 2_000_000
    assert made[1]["records"]["order"] == ["012", "120", "210", "012"]
    assert "kl_minus_rtn" not in made[0] and "kl_minus_rtn" not in made[1]
    difference = made[2]["kl_minus_rtn"]
    assert difference["value"] == pytest.approx(-0.3 / 40)
    assert difference["low"] < difference["value"] < difference["high"] <= 0.0


def test_the_table_shows_every_engine() -> None:
    name, table = table_of(_document(), "any")
    assert name == "mini-quantization" and table == quantization_table(_document())
    lines = table.splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[2].startswith("| bf16 | 2.0 |  |  |  |  |  | 0.750 [")
    assert lines[3].startswith("| int4 rtn | 2.0 | 19.0 / 19.0 | 0.015 [")
    assert "| 1.000, +0.250 [+0.000, +0.750] |" in lines[3]
    assert "4 held-out lists of 2 to 10 pages, seed 3" in table and "abc1234" in table
