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
_HEADERS = ("int8", "packed_layer", "packing", "product", "vectors")


def _library(name: str, sources: tuple[str, ...], *options: str) -> Extension:
    return Extension(
        f"winnow.kernels.cpu.{name}",
        sources=[f"{_KERNELS}/{source}.cpp" for source in sources],
        depends=[f"{_KERNELS}/{header}.h" for header in _HEADERS],
        language="c++",
        extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", *options],
        extra_link_args=["-fopenmp"],
        optional=True,
    )


_LIBRARY = _library(
    "_library",
    _SOURCES,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC finds some in its own header
)
_PORTABLE = _library("_portable", ("masses",), "-fno-trapping-math")  # so that selects are vectors
_BUILT = [_PORTABLE] if sys.platform == "linux" else []
if _BUILT and platform.machine() == "x86_64":
    _BUILT.append(_LIBRARY)

setup(
    ext_modules=_BUILT,
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
