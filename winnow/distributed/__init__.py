"""One model on several devices of a machine: each rank is a process with a share of every layer.

Rank 0 is the worker's own process: it schedules, selects, samples, and speaks to other workers. The
others follow its commands. See docs/tensor_parallel.md.
"""
