"""`winnow decode`: one decode worker as its own process."""

import asyncio
import logging
import os
import signal

from services.common.settings import Settings
from services.common.tracing import configure_tracing
from services.decode.worker import DecodeWorker
from winnow.errors import EngineFailed

logger = logging.getLogger(__name__)


async def run_decode(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain and stop. A second signal cuts the drain short.

    Raises UnusableModel or InvalidSetting if the worker cannot start, EngineFailed if it can no
    longer serve.
    """
    worker = DecodeWorker(settings)
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _take_signal, number, worker, signals)
    configure_tracing(settings.otlp_endpoint, settings.trace_sample_ratio, "decode")
    await worker.start()
    try:
        await _until_told_to_stop(worker, signals)
        await _drain(worker, settings.drain_timeout_s, signals)
    finally:
        await worker.stop()


def _take_signal(number: int, worker: DecodeWorker, signals: "asyncio.Queue[int]") -> None:
    """Queue the signal; exit at once if the worker has no address yet.

    It has nothing to drain then, and the thread that loads its model must not be joined.
    """
    if not worker.address:
        logger.info("stopped while it started")
        os._exit(128 + number)
    signals.put_nowait(number)


async def _until_told_to_stop(worker: DecodeWorker, signals: "asyncio.Queue[int]") -> None:
    told = asyncio.create_task(signals.get())
    broken = asyncio.create_task(worker.wait_until_broken())
    await asyncio.wait((told, broken), return_when=asyncio.FIRST_COMPLETED)
    if broken.done():
        told.cancel()
        raise EngineFailed("the decode engine has ended; start the worker again")
    broken.cancel()


async def _drain(worker: DecodeWorker, timeout_s: float, signals: "asyncio.Queue[int]") -> None:
    logger.info("draining, for %g seconds at most", timeout_s)
    drain = asyncio.create_task(worker.drain(timeout_s))
    again = asyncio.create_task(signals.get())
    await asyncio.wait((drain, again), return_when=asyncio.FIRST_COMPLETED)
    left = drain.result() if drain.done() else len(worker.admission)
    for task in (drain, again):
        task.cancel()
    await asyncio.gather(drain, again, return_exceptions=True)
    if left:
        logger.warning("%d requests are broken off", left)
