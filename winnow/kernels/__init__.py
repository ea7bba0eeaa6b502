"""What a decode step computes on pages and hidden states, beside the layers' matrix products.

Each module here is plain PyTorch, for any device. Its namesake in winnow/kernels/gpu/ has the same
functions as Triton kernels, for CUDA; only that package imports Triton. winnow/kernels/cpu/ has
some of them in C++.
"""
