"""Names of workloads and contenders, for the command line; loads nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

WorkloadName = Literal["mini", "mmdocir", "dense", "vidore", "small"]
MINI: WorkloadName = "mini"

CELLS: Mapping[WorkloadName, tuple[int, int]] = {
    "mmdocir": (22, 28),  # 616 visual tokens: a Letter page at 72 dpi, as most of MMDocIR are
    "dense": (32, 40),  # 1,280
    "vidore": (40, 64),  # 2,560
    "small": (3, 4),  # 12, to try a run; a figure about it says nothing
}
"""Columns and rows of 28 pixels that a page has; each is one visual token."""

ENGINES = ("bf16", "int8", "int4")
"""Quantizations of ours that take part."""

PEERS: tuple[str, ...] = (
    "transformers",
    "transformers-sampled",
    "transformers-static",
    "ours-bf16",
    "ours-int8",
    "ours-int4",
    "ours-bf16-default",
    "ours-int8-default",
    "ours-int4-default",
    "bitsandbytes-nf4",
    "bitsandbytes-int8",
    "tinygemm-g128",
    "tinygemm-g64",
    "tinygemm-g32",
    "vllm-bf16",
    "vllm-fp8",
    "vllm-gptq",
    "llama.cpp",
)
"""Every contender; the first is what the others are held against."""
