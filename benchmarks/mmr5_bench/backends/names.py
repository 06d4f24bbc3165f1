"""Names of shapes and contenders, for the command line and tables; loads nothing else."""

from __future__ import annotations

from mmr5_bench.peers.names import MINI

SHAPE_NAMES = (MINI, "0.5b", "7b-layers", "tiny")
DEFAULT_SHAPES = SHAPE_NAMES[:3]

BASELINE = "transformers bfloat16"
REFERENCE = "transformers float32"
TORCH = "torch int4"
MEASURED = "ONNX Runtime int4"
SUBJECTS = (BASELINE, REFERENCE, TORCH, MEASURED)
"""Who is timed on prompts and steps; the logits of the second are what others are held against."""
NATIVE = "torch"
"""What our torch engine of the same format is called among the rivals of ONNX Runtime."""
RERANK = "rerank"
"""What whole reranks are called where prompts and steps have their kind."""
