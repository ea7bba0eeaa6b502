"""A process that computes a prompt."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFILL_WORKER = """
import sys, time
from pathlib import Path
from services.common.cores import SharedCores
with SharedCores(Path(sys.argv[1])).prefilling():
    print("computes", flush=True)
    time.sleep(60)
"""


@contextmanager
def prefill_process(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that computes a prompt."""
    command = [sys.executable, "-c", PREFILL_WORKER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "computes\n"
            yield process
        finally:
            process.kill()
