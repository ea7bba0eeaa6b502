"""C++ kernels for CPUs with AVX-512's bfloat16, each with the signature of its reference.

setup.py builds them. `library.is_usable` says whether they can be used here.
"""
