"""What SIGINT and SIGTERM do to a command: they end it, whatever it is doing just then."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

EXIT_INTERRUPTED = 130
_GRACE_S = 3.0
_STDERR = 2
_STOP = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While it is entered, SIGINT raises KeyboardInterrupt in the main thread.

    That may get lost (in a library's bare `except`, in a finaliser) or come late (threads that load
    weights are waited for): the process then ends by itself after some seconds, and at once at a
    second SIGINT.  farewell: what it says to that.

    It listens even where a script started the command in the background: shells make such a
    command ignore SIGINT, and Python leaves it at that. In any other thread than the main one it
    does nothing: signals do not come there.
    """

    def __init__(self) -> None:
        self.farewell = "stopped"
        self._interrupted = False
        self._listens = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Interrupts":
        if not self._listens:
            return self
        self._watched, self._told = os.pipe()
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        threading.Thread(target=self._watch, name="interrupts", daemon=True).start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, self._before)
            os.close(self._told)

    def end_process(self) -> NoReturn:
        """Says farewell and is gone, without a wait for what other threads do.

        Nor by way of sys.exit: Python dies of SIGINT instead where KeyboardInterrupt has passed
        through an exec() of its own, as in the making of a dataclass.
        """
        with contextlib.suppress(OSError):
            os.write(_STDERR, f"winnow: {self.farewell}\n".encode())
        os._exit(EXIT_INTERRUPTED)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self._interrupted:
            self.end_process()
        self._interrupted = True
        os.write(self._told, b".")
        raise KeyboardInterrupt

    def _watch(self) -> None:
        interrupted = os.read(self._watched, 1)  # nothing, if it was left before
        if interrupted and not select.select([self._watched], [], [], _GRACE_S)[0]:
            self.end_process()
        os.close(self._watched)


class StopSignals:
    """While it is entered, SIGINT and SIGTERM are noted, for a service that drains before it ends.

    Nothing is raised where a signal happens to come: in the middle of an import that can leave
    Python's import lock taken for ever.  number: the last that came.
    """

    number: int | None = None

    def __enter__(self) -> "StopSignals":
        self._arrived, self._arrive = os.pipe()
        self._before = {number: signal.getsignal(number) for number in _STOP}
        self.listen()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._arrived)
        os.close(self._arrive)

    def listen(self) -> None:
        _handle(self._note)

    def raise_next(self) -> None:
        """From now on a signal raises KeyboardInterrupt wherever it comes."""
        _handle(signal.default_int_handler)

    def ignore(self) -> None:
        """From now on."""
        _handle(signal.SIG_IGN)

    def wait(self, timeout_s: float | None = None) -> None:
        """Until a signal has come or the time has passed."""
        select.select([self._arrived], [], [], timeout_s)

    def check(self, wait_s: float = 0) -> None:
        """Raises KeyboardInterrupt if a signal has come, or does within that time."""
        self.wait(wait_s)
        if self.number is not None:
            raise KeyboardInterrupt

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        os.write(self._arrive, b".")


def _handle(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in _STOP:
        signal.signal(number, handler)
