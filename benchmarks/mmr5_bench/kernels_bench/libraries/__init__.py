"""Kernels of other libraries, fed with our stored weights and held against our references."""
