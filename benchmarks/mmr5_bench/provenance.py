"""Which code made a figure: the commit of this checkout, and the versions it ran with."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch


def provenance() -> dict[str, str]:
    """Commit (``-dirty`` when files differ from it), command line, versions and processor."""
    return {
        "commit": _commit() or "unknown",
        "command": _command(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }


def _commit() -> str:
    """Of the checkout this file is tracked in, and of no other one around it.

    ``MMR5_COMMIT`` says it where a checkout has travelled without its history.
    """
    if named := os.environ.get("MMR5_COMMIT"):
        return named
    if not _git("ls-files", Path(__file__).name):
        return ""
    return _git("describe", "--always", "--dirty")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _command() -> str:
    """The command that runs; of a program only its name, of ``python -m`` its package."""
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return f"{name} {shlex.join(sys.argv[1:])}".rstrip()
