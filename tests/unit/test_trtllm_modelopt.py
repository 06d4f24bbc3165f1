"""ModelOpt itself, where it is installed: the golden files are what it makes today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.trtllm_oracle import CASES, DTYPES, run

GOLDEN = Path(__file__).parents[1] / "golden" / "modelopt"

pytest.importorskip(
    "modelopt.torch.export",
    reason="ModelOpt is not installed; tests/golden/modelopt/README.md says how to compare with it",
)


@pytest.mark.parametrize("case", CASES)
def test_modelopt_makes_the_golden_files(case: str, tmp_path: Path) -> None:
    run(CASES[case], tmp_path)
    for dtype in DTYPES:
        for file in ("config.json", "tensors.json"):
            found = json.loads((tmp_path / dtype / file).read_text())
            assert found == json.loads((GOLDEN / case / dtype / file).read_text()), (dtype, file)
    golden = GOLDEN / case / "values.safetensors"
    made = tmp_path / golden.name
    assert made.exists() == golden.exists()
    if golden.exists():
        found, expected = load_file(made), load_file(golden)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
