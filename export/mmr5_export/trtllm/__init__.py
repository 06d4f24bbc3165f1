"""Files for TensorRT-LLM: checkpoints in its own layout and in that of its PyTorch backend."""
