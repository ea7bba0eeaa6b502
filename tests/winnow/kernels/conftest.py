"""Triton reads at its import whether it interprets: tests of the interpreter run on their own."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") else ["interpreted"]
