"""Which Triton kernels have been proven on a GPU: data, in ``proven.json``.

A kernel is proven on an SM once its tests have passed there on hardware. The file maps "sm_90" to
``{"commit": ..., "date": ..., "kernels": [names]}``: the commit that was tested and the day. It is
edited by hand, after such a run; ``kernels="auto"`` chooses no other Triton kernel.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any


@cache
def records() -> dict[str, dict[str, Any]]:
    """The whole file: by SM, the commit, the date and the names."""
    text = resources.files("mmr5_kernels").joinpath("proven.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def names(capability: tuple[int, int]) -> frozenset[str]:
    """Kernels proven on GPUs of this compute capability, which is exact: 8.6 is not 8.0."""
    record = records().get("sm_{}{}".format(*capability), {})
    return frozenset(record.get("kernels", ()))
