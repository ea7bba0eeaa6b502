"""Installs `services`, `evals` and the embedded model inside `winnow_serve`, side by side.

At the top level of site-packages their names could collide with other packages'; see
winnow_serve/__init__.py. Builds the kernels for CPUs. Everything else is in pyproject.toml.
"""

import platform
import sys

from setuptools import Extension, find_packages, setup

_PRIVATE = "winnow_serve._private"
_MOVED = ("services", "evals", "models")

# The kernels for CPUs: a plain library, which ctypes loads. Without a compiler Winnow does without.
_KERNELS = "winnow/kernels/cpu"
_SOURCES = ("attention", "layer", "linear", "masses", "packed_layer", "recompression")
_HEADERS = ("int8", "packed_layer", "packing", "product", "vectors")
_LIBRARY = Extension(
    "winnow.kernels.cpu._library",
    sources=[f"{_KERNELS}/{name}.cpp" for name in _SOURCES],
    depends=[f"{_KERNELS}/{name}.h" for name in _HEADERS],
    language="c++",
    extra_compile_args=[
        *("-O3", "-std=c++17", "-fopenmp", "-fno-math-errno"),
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c"),
        *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC finds some in its own header
    ],
    extra_link_args=["-fopenmp"],
    optional=True,
)
_IS_BUILT = sys.platform == "linux" and platform.machine() == "x86_64"

setup(
    ext_modules=[_LIBRARY] if _IS_BUILT else [],
    packages=[
        *find_packages(include=["winnow", "winnow.*", "winnow_serve"]),
        *(f"{_PRIVATE}.{name}" for name in find_packages(include=["services*", "evals*"])),
        f"{_PRIVATE}.models",
    ],
    package_dir={f"{_PRIVATE}.{name}": name for name in _MOVED},
    package_data={
        "": ["py.typed", "*.pyi", "*.json", "*.html", "*.css", "*.js", "*.txt"],
        f"{_PRIVATE}.models": ["winnow-tiny/*"],
    },
)
