"""How torch's threads wait for each other: they spin for a moment, then they sleep.

Unless told so, OpenMP's threads spin for milliseconds. Beside any other busy process a thread then
spins on a core on which the one it waits for could run, and a step takes up to a hundred times as
long. Threads that never spin are slow alone: waking one up takes longer than a small operation.

GNU's runtime, which torch's builds for CPUs bring, reads the number of turns, some 20 µs; Intel's
and LLVM's read the policy. Both do when torch is imported.
"""

SHORT_WAITS = {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "PASSIVE"}
