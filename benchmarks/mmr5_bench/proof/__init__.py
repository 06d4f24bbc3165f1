"""Every kernel of ours against its reference on the GPU at hand, and the record of which are right.

``kernels="auto"`` uses a Triton kernel only on GPUs it has been proven on (``proven.json``).
"""
