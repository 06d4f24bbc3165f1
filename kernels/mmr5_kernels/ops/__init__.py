"""Triton kernels, one file per op. Importing any of them imports Triton.

Every op has a plain torch function elsewhere in :mod:`mmr5_kernels` that is its specification.
"""
