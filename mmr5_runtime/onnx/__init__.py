"""The ONNX Runtime engine: the same model, run from graphs that ``mmr5-export`` wrote."""
