"""Kernels in CUDA C++: sources in ``csrc``, compiled by NVRTC when first used, launched by ctypes.

None of them has run on a GPU, so none is a default. Importing this package loads no library and
starts nothing.
"""
