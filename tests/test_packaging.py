"""What an installation provides, and what it must not: `kernels` and `export` as global names."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTER_FOLDERS = ("benchmarks", "export", "kernels", "tests")
PACKAGES = {"mmr5_bench", "mmr5_export", "mmr5_kernels", "mmr5_runtime"}
MAX_LINES = 400


def python_files() -> list[Path]:
    roots = [ROOT / "mmr5_runtime", *(ROOT / folder for folder in OUTER_FOLDERS)]
    return sorted(file for root in roots for file in root.rglob("*.py"))


def run_elsewhere(code: str, folder: Path) -> str:
    """Output of ``code`` in a fresh interpreter that knows only what is installed.

    Outside the repository, because the importlib mode of pytest itself registers `tests`.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_distribution_provides_only_our_packages() -> None:
    try:
        importlib.metadata.distribution("mmr5-runtime")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mmr5-runtime is not installed in this environment")
    provided = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if "mmr5-runtime" in owners
    }
    assert provided == PACKAGES


def test_outer_folders_are_not_importable_and_packages_are(tmp_path: Path) -> None:
    code = (
        "import importlib.util, json\n"
        f"names = {(*OUTER_FOLDERS, *sorted(PACKAGES))!r}\n"
        "print(json.dumps([n for n in names if importlib.util.find_spec(n) is not None]))"
    )
    found = set(json.loads(run_elsewhere(code, tmp_path)))
    if not found & PACKAGES:
        pytest.skip("mmr5-runtime is not installed in this environment")
    # Some other distribution may own a package of such a name; ours must not be what is found.
    foreign = found - PACKAGES
    for name in foreign:
        origin = run_elsewhere(
            "import importlib.util\n"
            f"spec = importlib.util.find_spec({name!r})\n"
            "print(spec.origin, *(spec.submodule_search_locations or ()))",
            tmp_path,
        )
        assert str(ROOT / name) not in origin
    assert found >= PACKAGES


@pytest.mark.parametrize("folder", OUTER_FOLDERS)
def test_outer_folders_are_not_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_conftest_at_the_root() -> None:
    """It would put the root, and with it `kernels`, on the path of every test run."""
    assert not (ROOT / "conftest.py").exists()


@pytest.mark.parametrize("folder", ["mmr5_runtime", "export/mmr5_export", "kernels/mmr5_kernels"])
def test_packages_are_typed(folder: str) -> None:
    assert (ROOT / folder / "py.typed").is_file()
    assert (ROOT / folder / "__init__.py").is_file()


def test_no_file_is_too_long() -> None:
    lengths = {
        file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in python_files()
    }
    assert len(lengths) > 10
    assert {name: count for name, count in lengths.items() if count > MAX_LINES} == {}
