"""What pyproject.toml cannot say: where `services`, `evals` and the embedded model are installed.

Not at the top, where other packages may have these names too, but inside `winnow_serve`, side by
side as in the repository. See winnow_serve/__init__.py.
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
        "winnow": ["py.typed"],
        f"{_PRIVATE}.services.explain": ["page.html"],
        f"{_PRIVATE}.models": ["winnow-tiny/*"],
    },
)
