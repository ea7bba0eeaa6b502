"""Triton reads at its import whether it interprets: tests of the interpreter run on their own.

It exists for Linux on x86-64 only.
"""

import importlib.util
import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") else ["interpreted"]
if importlib.util.find_spec("triton") is None:
    collect_ignore += ["compiled.py", "test_compiled.py", "test_interpreted.py"]
