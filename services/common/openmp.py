"""OpenMP settings for torch's threads: spin briefly when waiting for each other, then sleep.

By default OpenMP threads spin for milliseconds. If another process is busy, a thread then spins on
a core that the thread it waits for could use, and a step takes up to a hundred times as long.
Threads that never spin are slow on an idle machine: a wakeup takes longer than a small operation.

GNU's runtime, which torch's CPU builds ship, reads the spin count (here some 20 µs); Intel's and
LLVM's read the policy. All read them when torch is imported.
"""

SHORT_WAITS = {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "PASSIVE"}
