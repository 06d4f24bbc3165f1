"""Imports point one way: kernels <- runtime <- export <- bench, and the runtime stays lean."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "mmr5_kernels": ROOT / "kernels" / "mmr5_kernels",
    "mmr5_runtime": ROOT / "mmr5_runtime",
    "mmr5_export": ROOT / "export" / "mmr5_export",
}
# What each package may import of ours beside itself; the dotted names are modules.
ALLOWED = {
    "mmr5_kernels": set[str](),
    "mmr5_runtime": {"mmr5_kernels"},
    "mmr5_export": {
        "mmr5_kernels.layout",
        "mmr5_kernels.reference",
        "mmr5_runtime",  # calibration runs the very model it quantizes
    },
}
NEVER_IN_RUNTIME = {"transformers", "torchvision", "rich", "huggingface_hub", "onnx"}
# Engines of others, each known to one module.
ONLY_IN = {
    "onnxruntime": "mmr5_runtime/onnx/session.py",
    "tensorrt": "mmr5_runtime/trtllm/runner.py",
    "tensorrt_llm": "mmr5_runtime/trtllm/runner.py",
}


def imported_names(source: str) -> set[str]:
    """Dotted names a file imports anywhere, also inside functions; `from a import b` is `a.b`."""
    names = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test can read them"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def breaches(package: str, source: str) -> set[str]:
    """Imports of ``source``, a file of ``package``, that point the wrong way."""
    allowed = ALLOWED[package] | {package}
    return {
        name
        for name in imported_names(source)
        if name.startswith("mmr5_")
        and not any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    wrong = {
        file.relative_to(ROOT).as_posix(): found
        for file in files
        if (found := breaches(package, file.read_text(encoding="utf-8")))
    }
    assert wrong == {}


@pytest.mark.parametrize("package", ["mmr5_kernels", "mmr5_runtime"])
def test_no_heavy_package_is_named(package: str) -> None:
    for file in PACKAGES[package].rglob("*.py"):
        tops = {name.partition(".")[0] for name in imported_names(file.read_text(encoding="utf-8"))}
        elsewhere = {name for name, home in ONLY_IN.items() if file != ROOT / home}
        assert not tops & (NEVER_IN_RUNTIME | elsewhere), file.name


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("mmr5_kernels", "import mmr5_runtime.types"),
        ("mmr5_runtime", "from mmr5_export import quantize"),
        ("mmr5_runtime", "def f():\n    from mmr5_bench.minidocs import lists"),
        ("mmr5_export", "from mmr5_kernels.dispatch import choose"),
        ("mmr5_export", "from mmr5_bench.minidocs import lists"),
    ],
)
def test_the_rule_catches(package: str, line: str) -> None:
    assert breaches(package, line)
