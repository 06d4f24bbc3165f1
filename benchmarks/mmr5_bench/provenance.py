"""Which code made a figure: the commit of this checkout, and the versions it ran with."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import torch


def provenance() -> dict[str, str]:
    """Commit (``-dirty`` when files differ from it), command line, versions and processor."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except OSError:  # no git
        commit = ""
    return {
        "commit": commit or "unknown",
        "command": _command(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }


def _command() -> str:
    """The command that runs; of a program only its name, of ``python -m`` its package."""
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return " ".join([name, *sys.argv[1:]])
