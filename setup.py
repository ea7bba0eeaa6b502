"""Installs `services`, `evals` and the embedded model inside `winnow_serve`, side by side.

At the top level of site-packages their names could collide with other packages'; see
winnow_serve/__init__.py. Everything else is in pyproject.toml.
"""

from setuptools import find_packages, setup

_PRIVATE = "winnow_serve._private"
_MOVED = ("services", "evals", "models")

setup(
    packages=[
        *find_packages(include=["winnow", "winnow.*", "winnow_serve"]),
        *(f"{_PRIVATE}.{name}" for name in find_packages(include=["services*", "evals*"])),
        f"{_PRIVATE}.models",
    ],
    package_dir={f"{_PRIVATE}.{name}": name for name in _MOVED},
    package_data={
        "": ["py.typed", "*.pyi", "*.json", "*.html"],
        f"{_PRIVATE}.models": ["winnow-tiny/*"],
    },
)
