"""ONNX graphs of the model, node by node from its spec: for ONNX Runtime, and for TensorRT.

Not traced from a library's modules: the graph is what the runtime computes, its names are ours, and
nothing of the weights need be in memory to write it.
"""
