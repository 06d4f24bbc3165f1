"""Importing the package is cheap and leaves every device alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mmr5_runtime

ROOT = Path(__file__).parents[1]
HEAVY = (
    "transformers",
    "onnx",
    "onnxruntime",
    "torchvision",
    "matplotlib",
    "huggingface_hub",
    "rich",
)


def modules_after(code: str) -> set[str]:
    """Names in ``sys.modules`` of a fresh interpreter that ran ``code``."""
    report = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + report],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_alone_loads_nothing_heavy() -> None:
    loaded = modules_after("import mmr5_runtime")
    assert "mmr5_runtime" in loaded
    assert not loaded & {*HEAVY, "torch", "PIL", "numpy"}


def test_using_every_public_name_needs_no_heavy_package_and_no_device() -> None:
    loaded = modules_after(
        "import mmr5_runtime\n"
        "for name in mmr5_runtime.__all__: getattr(mmr5_runtime, name)\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()"
    )
    assert {"torch", "mmr5_runtime.reranker"} <= loaded
    assert not loaded & set(HEAVY)


def test_public_names_are_listed() -> None:
    assert set(mmr5_runtime.__all__) <= set(dir(mmr5_runtime))
    assert mmr5_runtime.RerankResult.__module__ == "mmr5_runtime.types"


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Ranker'"):
        mmr5_runtime.Ranker  # noqa: B018
