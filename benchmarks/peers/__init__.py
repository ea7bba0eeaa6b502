"""Other engines, each run by a Python that has it; see benchmarks/beside.py."""
