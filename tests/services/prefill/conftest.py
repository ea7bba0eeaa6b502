"""A tiny model, a queue that runs it, and a receiver."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.common.jobs import PrefillJob
from services.prefill.metrics import PrefillMetrics
from services.prefill.queue import PrefillQueue
from tests.deadlines import SOON_S
from tests.services.prefill.receiver import GRANT, Receiver
from winnow.decoder import DecoderModel
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings

NUM_TOKENS = 300
PRUNING = PruningSettings(
    method="fastkv", fixed_layer=1, select_tokens=128, kv_budget=64, window_size=16
)

MakeJob = Callable[..., PrefillJob]


def until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture(scope="session")
def model(tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models["qwen2"])


@pytest.fixture
def receiver(model: DecoderModel) -> Iterator[Receiver]:
    receiver = Receiver(model, NUM_TOKENS)
    yield receiver
    receiver.stop()


@pytest.fixture
def metrics() -> PrefillMetrics:
    return PrefillMetrics("tiny")


@pytest.fixture
def queue(model: DecoderModel, metrics: PrefillMetrics) -> Iterator[PrefillQueue]:
    queue = PrefillQueue(model, metrics, max_waiting=2, max_open=4, num_threads=1)
    queue.start()
    yield queue
    queue.stop()


@pytest.fixture
def make_job(receiver: Receiver) -> MakeJob:
    def make(request_id: str = "r1", **changes: object) -> PrefillJob:
        values = {
            "request_id": request_id,
            "attempt": 1,
            "token_ids": tuple(range(1, NUM_TOKENS + 1)),
            "pruning": PRUNING,
            "kv_address": receiver.address,
            "ticket": GRANT.ticket(1),
            "deadline_s": 30.0,
        }
        return PrefillJob(**(values | changes))  # type: ignore[arg-type]

    return make
