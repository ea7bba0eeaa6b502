"""A rank other than 0, as a process: `python -m winnow.distributed.follower FD NEWS_FD`.

It does what rank 0 tells it by the pipe of the first file descriptor, and ends when the pipe does,
even in the middle of a computation: rank 0 has ended then. A third argument names its Extension.
"""

import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from winnow.catalog import load as load_class
from winnow.distributed.commands import (
    Answer,
    Clear,
    CollectLayer,
    Command,
    Cut,
    Expect,
    Extend,
    Failed,
    FillAdapter,
    Filled,
    Load,
    Logits,
    OpenPool,
    OpenRing,
    PackLayer,
    PrefillLayer,
    PrepareSteps,
    ReadLayer,
    Ready,
    Record,
    ScoreLayer,
    Step,
    TakeArrived,
    WriteLayer,
)
from winnow.distributed.exchange import receive as receive_shared
from winnow.distributed.group import device_of, expect_steps, join
from winnow.distributed.heads import Split
from winnow.distributed.in_step import StepModel
from winnow.distributed.pipes import Pipe, receive, send
from winnow.distributed.rank_pool import RankPool
from winnow.distributed.rank_prefill import RankPrefill, give_packed
from winnow.errors import UnusableAdapter, WinnowError
from winnow.kv import LayerKV
from winnow.models import load_model

logger = logging.getLogger(__name__)


class Extension(Protocol):
    """What a service has a follower do besides, on its thread: a class, made with the Follower."""

    def do(self, message: Any) -> Any:  # noqa: ANN401
        """Take a message; what it returns is the answer to it, if that is not None."""

    def ship(self, shipment: int, layer: LayerKV) -> None:
        """Send a layer's KV of this rank's heads."""


class Follower:
    """Does commands one by one, on its own heads.

    news: to rank 0, which asks for none: `tell_news` may be called from any thread.
    """

    def __init__(
        self, pipe: Pipe, news: Pipe, load: Load, extend: "Callable[[Follower], Extension] | None"
    ) -> None:
        split = Split(load.rank, load.num_ranks)
        torch.set_num_threads(load.num_threads)
        device = device_of(load.options["device"], load.rank)
        join(split, load.rendezvous, device)
        model = load_model(load.model, **{**load.options, "device": device}, split=split)
        self.model = StepModel(model, load.rank)
        self.pool: RankPool
        self._pipe = pipe
        self._news = news
        self._telling = threading.Lock()
        self._split = split
        self._prefill = RankPrefill(model, split)
        self._extension = extend(self) if extend else None

    def do(self, command: Command) -> None:
        match command:
            case PrefillLayer() | ScoreLayer() | CollectLayer() | PackLayer():
                self._do_prefill(command)
            case Step():
                self.pool.step(command)
            case Record():
                self.pool.record(command)
            case Logits():
                self._compute_logits(command)
            case OpenPool():
                self.pool = RankPool(self.model, command, self._split)
            case PrepareSteps():
                self.pool.prepare_steps(command)
            case FillAdapter():
                self._answer(self._fill_adapter(command))
            case Extend():
                self._extend(command.message)
            case _:
                self._do_to_row(command)

    def _do_to_row(self, command: Command) -> None:
        match command:
            case WriteLayer():
                self.pool.write(command)
            case ReadLayer():
                self._answer(self.pool.read(command))
            case OpenRing():
                self.pool.open_ring(command)
            case Clear():
                self.pool.clear(command)
            case Cut():
                self.pool.cut(command)
            case Expect():
                self.pool.expect(command)
            case TakeArrived():
                self._answer(self.pool.take_arrived(command))
            case _:
                raise AssertionError(f"{command} cannot be done here")

    def _do_prefill(self, command: Command) -> None:
        match command:
            case PrefillLayer():
                self._prefill.compute(command)
            case ScoreLayer():
                self._prefill.score(command)
            case CollectLayer():
                self._prefill.collect(command)
            case PackLayer():
                self._pack(command)

    def _pack(self, command: PackLayer) -> None:
        layer = self._prefill.pack(command)
        if command.shipment is None:
            give_packed(layer)
        else:
            assert self._extension is not None
            self._extension.ship(command.shipment, layer)

    def _extend(self, message: object) -> None:
        assert self._extension is not None
        answer = self._extension.do(message)
        if answer is not None:
            self._answer(answer)

    def _fill_adapter(self, command: FillAdapter) -> Filled:
        adapters = self.model.adapters
        assert adapters is not None
        try:
            adapters.fill(command.slot, command.description)
        except UnusableAdapter as error:
            return Filled(error.message)
        return Filled()

    def _compute_logits(self, command: Logits) -> None:
        shape = self.model.shape
        size = (command.num_hidden, shape.hidden_size)
        self.model.logits(receive_shared(size, shape.dtype, self.model.device))

    def _answer(self, answer: Answer) -> None:
        send(self._pipe, answer)

    def tell_news(self, news: object) -> None:
        with self._telling:
            send(self._news, news)


def follow(pipe: Pipe, news: Pipe, extend: Callable[[Follower], Extension] | None) -> None:
    """Load, and do commands until the process ends."""
    load = receive(pipe)
    assert isinstance(load, Load)
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, commands.put), daemon=True).start()
    try:
        follower = Follower(pipe, news, load, extend)
    except WinnowError as error:
        send(pipe, Failed(error.message))
        raise
    send(pipe, Ready())
    expect_steps()
    with torch.inference_mode():
        while True:
            follower.do(commands.get())


def _read(pipe: Pipe, put: Callable[[Command], None]) -> None:
    """Take commands off the pipe as they come; rank 0 never waits for this rank to compute."""
    try:
        while True:
            put(receive(pipe))
    except (EOFError, OSError):
        os._exit(0)  # the main thread may be waiting for a rank that is gone


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("winnow.engine.step_runner").setLevel(logging.ERROR)  # rank 0 warns for all
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 drains first, and then ends this one
        signal.signal(number, signal.SIG_IGN)
    try:
        pipe, news = (Connection(int(fd)) for fd in sys.argv[1:3])
        follow(pipe, news, load_class(sys.argv[3]) if sys.argv[3:] else None)
    except BaseException:
        logger.exception("a rank has failed")
        logging.shutdown()
        os._exit(1)  # without waiting for threads of a group that is broken


if __name__ == "__main__":
    main()
