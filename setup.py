"""Installs `services`, `evals` and the embedded model inside `winnow_serve`, side by side.

At the top level of site-packages their names could collide with other packages'; see
winnow_serve/__init__.py. Builds the kernels for CPUs. Everything else is in pyproject.toml.
"""

import platform
import sys

from setuptools import Extension, find_packages, setup

_PRIVATE = "winnow_serve._private"
_MOVED = ("services", "evals", "models")

# The kernels for CPUs: plain libraries, which ctypes loads. Without a compiler Winnow does without.
_KERNELS = "winnow/kernels/cpu"
_SOURCES = ("attention", "layer", "linear", "packed_layer", "recompression")
_HEADERS = ("int8", "packed_layer", "packing", "product", "vectors", "version")


def _library(
    name: str, sources: tuple[str, ...], headers: tuple[str, ...], *options: str
) -> Extension:
    return Extension(
        f"winnow.kernels.cpu.{name}",
        sources=[f"{_KERNELS}/{source}.cpp" for source in sources],
        depends=[f"{_KERNELS}/{header}.h" for header in headers],
        language="c++",
        extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", *options],
        extra_link_args=["-fopenmp"],
        optional=True,
    )


_LIBRARY = _library(
    "_library",
    _SOURCES,
    _HEADERS,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC finds some in its own header
)
# Selects become vectors only where comparisons need not trap.
_PORTABLE = _library("_portable", ("masses",), ("version",), "-fno-trapping-math")
_IS_BUILT = sys.platform == "linux" and platform.machine() == "x86_64"

setup(
    ext_modules=[_LIBRARY, _PORTABLE] if _IS_BUILT else [],
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
