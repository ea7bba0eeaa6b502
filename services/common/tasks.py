"""Helpers that end asyncio tasks and check them for cancellation."""

import asyncio
from typing import Any

_AGAIN_S = 1.0


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and return when all have ended, in whatever way.

    Cancels repeatedly: asyncio.wait_for loses a cancellation that arrives as its inner future
    completes (Python before 3.12), and so does everything that uses it, such as redis-py.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
    for task in tasks:
        note_error(task)


def note_error(task: asyncio.Task[Any]) -> None:
    """Done callback: retrieve the task's exception, so that asyncio does not log it as lost."""
    if not task.cancelled():
        task.exception()


def is_cancelled() -> bool:
    """Whether the current task was asked to end; if not, a CancelledError in it is not its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
