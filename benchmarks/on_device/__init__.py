"""The sections of `python -m benchmarks.gpu`, each independent of the others.

None needs the services or Ray. On a CPU they run the kernels' PyTorch references, so that the
script itself can be tested; what has no meaning there is reported as "needs CUDA".
"""
