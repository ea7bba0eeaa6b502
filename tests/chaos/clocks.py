"""Wall clocks that jump, one per process, as if somebody had set them."""

import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("clock.c")
_NUM_BYTES = struct.calcsize("l")


class Clocks:
    """Processes started with `variables` have a clock that `jump` sets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._library = folder / "clock.so"
        command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(self._library), str(_SOURCE)]
        subprocess.run(command, check=True)
        self._names: set[str] = set()

    def variables(self, name: str) -> dict[str, str]:
        """For the environment of the process, and of those that it starts."""
        self._names.add(name)
        self._file(name).write_bytes(bytes(_NUM_BYTES))
        return {"LD_PRELOAD": str(self._library), "CHAOS_CLOCK": str(self._file(name))}

    def jump(self, to_s: int, *names: str) -> None:
        """The clocks are wrong by `to_s` from now on; those of all processes unless some are named.

        The file is written in place: the processes have mapped it.
        """
        for name in names or self._names:
            with self._file(name).open("r+b") as file:
                file.write(struct.pack("l", to_s))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.clock"
