"""SIGINT and SIGTERM handling: a signal ends a command whatever it is doing."""

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
    """Context in which SIGINT raises KeyboardInterrupt in the main thread.

    KeyboardInterrupt may get lost (in a library's bare `except`, in a finalizer) or take long
    (threads that load weights are joined): the process then exits by itself after _GRACE_S seconds,
    and at once at a second SIGINT. Whatever error leaves the context after a SIGINT ends the
    process too: modules in C that are being imported make an ImportError of KeyboardInterrupt.
    farewell: the message it prints then.

    It handles SIGINT even if a script started the command in the background: shells make such a
    command ignore SIGINT, and Python leaves it ignored. Outside the main thread, where signals do
    not arrive, it does nothing.
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
        if self._interrupted and error is not None:
            self.end_process()
        if self._listens:
            signal.signal(signal.SIGINT, self._before)
            os.close(self._told)

    def end_process(self) -> NoReturn:
        """Print the farewell and exit at once, without joining other threads.

        Not through sys.exit: Python dies of SIGINT instead if KeyboardInterrupt has passed through
        one of its own exec() calls, as when it creates a dataclass.
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
        interrupted = os.read(self._watched, 1)  # empty if the context was left first
        if interrupted and not select.select([self._watched], [], [], _GRACE_S)[0]:
            self.end_process()
        os.close(self._watched)


class FirstInterrupt:
    """Context in which the first SIGINT is noted in `arrived`; later ones do what they did.

    For work that is to stop while the command goes on.
    """

    def __init__(self) -> None:
        self.arrived = False

    def __enter__(self) -> "FirstInterrupt":
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.arrived = True
        signal.signal(signal.SIGINT, self._before)


class StopSignals:
    """Context in which SIGINT and SIGTERM are recorded, for a service that drains before it ends.

    Nothing is raised where a signal arrives: in the middle of an import that can leave Python's
    import lock held for ever.  number: the last signal that arrived.
    """

    number: int | None = None

    def __enter__(self) -> "StopSignals":
        self._arrived, self._arrive = os.pipe()
        self._before = {number: signal.getsignal(number) for number in _STOP}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._arrived)
        os.close(self._arrive)

    def listen(self) -> None:
        _handle(self._note)

    def raise_next(self) -> None:
        """From now on a signal raises KeyboardInterrupt wherever it arrives."""
        _handle(signal.default_int_handler)

    def ignore(self) -> None:
        """Ignore signals from now on."""
        _handle(signal.SIG_IGN)

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until a signal has arrived or the timeout has passed."""
        select.select([self._arrived], [], [], timeout_s)

    def check(self, wait_s: float = 0) -> None:
        """Raise KeyboardInterrupt if a signal has arrived, or arrives within `wait_s`."""
        self.wait(wait_s)
        if self.number is not None:
            raise KeyboardInterrupt

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        os.write(self._arrive, b".")


def _handle(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in _STOP:
        signal.signal(number, handler)
