"""What an engine folder holds for ONNX Runtime."""

from __future__ import annotations

BACKEND = "onnxruntime"  # under this name in the manifest
DECODER, HEAD, VISION = "decoder.onnx", "head.onnx", "vision.onnx"
GRAPHS = (DECODER, HEAD, VISION)
