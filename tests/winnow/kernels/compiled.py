"""Compiles what the kernels' functions launch, for a GPU that need not be there.

The functions are called with tensors on `device="meta"`, so what is compiled is what would run: the
same constants, alignments and options.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of one kernel. spills: bytes of its stack and local memory, per thread.

    vector_loads, vector_stores: instructions that move 16 bytes; loads to shared memory count.
    narrow_loads: those that move 2 bytes, and copies to shared memory of 4: lost vector loads.
    has_half_products: whether numbers of 16 bits are multiplied on tensor cores.
    """

    kernel: str
    registers: int
    spills: int
    shared_bytes: int
    vector_loads: int
    vector_stores: int
    narrow_loads: int
    has_half_products: bool


class _AbsentGPU:
    """As much of a driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # what was compiled before is found by the device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(capability: int, launch: Callable[[], object]) -> list[Compiled]:
    """The kernels that `launch` starts, compiled for sm_`capability` and not started."""
    launched = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append(run(self, *args, grid=grid, warmup=True, **options))

    absent = patch.object(driver, "_active", _AbsentGPU(capability))
    with absent, patch.object(JITFunction, "run", compile_only):
        launch()
    return [_read(kernel) for kernel in launched]


def _read(kernel: Any) -> Compiled:
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    use = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        kernel=kernel.metadata.name,
        registers=use["REG"],
        spills=use["STACK"] + use["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        vector_loads=len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|cp\.async.*, 0x10,", ptx)),
        vector_stores=len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)),
        narrow_loads=len(re.findall(r"ld\.global[\w.:]*\.b16|cp\.async.*, 0x[24],", ptx)),
        has_half_products=re.search(r"mma\.sync[\w.]*\.(f16|bf16)\.", ptx) is not None,
    )
