"""A row to be, before anything of it exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmr5_bench.kernels_bench.workload import Workload


@dataclass(frozen=True)
class Task:
    """``subject`` is what it is called when it is skipped, ``make`` makes its operands.

    ``row`` is what is known of the row if making or running it fails; ``peer`` names whose
    kernel it is where it is not ours.
    """

    subject: str
    make: Callable[[], Workload]
    row: Mapping[str, Any] = field(default_factory=dict)
    peer: str = ""
