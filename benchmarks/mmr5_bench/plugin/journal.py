"""Finished entries, written down at once: what a run that is killed leaves behind.

One line of JSON each. A run begins with a line that says what it is (``evidence`` without entries)
and goes on with ``entry`` and ``skipped`` lines; runs follow each other in one file.
``load_evidence`` reads the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmr5_bench.files import append_lines


@dataclass(frozen=True)
class Journal:
    """Appends to ``path``, whose folder is made when it is needed."""

    path: Path

    def begin(self, head: Mapping[str, Any]) -> None:
        """Starts a run."""
        self.append({"evidence": head})

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds one line in one write."""
        append_lines(self.path, [line])
