"""Triton kernels, each with the signature of its namesake in winnow/kernels/.

Import them only where a CUDA device is used: Triton is not installed everywhere.
"""
