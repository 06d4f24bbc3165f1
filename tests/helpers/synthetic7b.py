"""A checkpoint with the names, shapes and sharding of Qwen2.5-VL-7B, random, and few layers."""

from __future__ import annotations

from mmr5_bench.random_weights.checkpoint import write_synthetic_7b
from mmr5_bench.random_weights.shapes import FIRST_SPECIAL_ID, config_7b

__all__ = ["EXPORT_AND_MEASURE", "FIRST_SPECIAL_ID", "config_7b", "write_synthetic_7b"]

# ``mmr5-export``, and then what Linux keeps as the high-water mark of this program alone;
# getrusage's figure also covers the test process it was started from.
EXPORT_AND_MEASURE = """
import sys
from mmr5_bench.evidence.memory import peak_resident_bytes
from mmr5_export.cli import main
status = main(sys.argv[1:])
print(peak_resident_bytes())
sys.exit(status)
"""
