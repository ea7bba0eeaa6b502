"""Several prompts on one engine: which layers it computes, in which order.

What a test does while a certain layer is computed, it does on the engine's own thread, so that the
order does not depend on time. Prompts are told apart by their number of tokens.
"""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

import pytest
import torch

from services.common.jobs import PrefillJob, PrefillOutcome
from services.common.metrics import render
from services.prefill.metrics import PrefillMetrics
from services.prefill.queue import PrefillQueue
from services.prefill.sender import Push
from services.prefill.work import Work
from tests.deadlines import SOON_S
from tests.services.exposed import value
from tests.services.prefill.conftest import PRUNING, MakeJob
from tests.services.prefill.receiver import Receiver
from tests.winnow.drive import prefill_all, prompt
from winnow.catalog import METHODS
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillRun
from winnow.errors import DeadlineExceeded, PrefillFailed, StaleAttempt
from winnow.pruning_settings import PruningSettings

LONG, MIDDLE, SHORT = 300, 60, 40  # tokens
UNCUT = replace(PRUNING, method="snapkv")
LAYERS = range(4)

Outcome = Future[PrefillOutcome]


class Layers:
    """The layers computed so far, and what to do during which: both as (tokens, layer_idx)."""

    def __init__(self, model: DecoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computed: list[tuple[int, int]] = []
        self.during: dict[tuple[int, int], Callable[[], object]] = {}
        self._run_layer = model.layer
        monkeypatch.setattr(model, "layer", self._layer)
        monkeypatch.setattr("services.prefill.sender.HELD_AFTER_S", SOON_S)  # or order is chance

    def _layer(self, layer_idx: int, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        layer = (hidden.shape[1], layer_idx)
        self.computed.append(layer)
        self.during.pop(layer, lambda: None)()
        return self._run_layer(layer_idx, hidden, *rest)


@pytest.fixture
def layers(model: DecoderModel, monkeypatch: pytest.MonkeyPatch) -> Layers:
    return Layers(model, monkeypatch)


@pytest.fixture
def receivers(model: DecoderModel) -> Iterator[dict[int, Receiver]]:
    """One for each length of a prompt."""
    by_length = {length: Receiver(model, length) for length in (LONG, MIDDLE, SHORT)}
    yield by_length
    for one in by_length.values():
        one.stop()


@pytest.fixture
def job_of(make_job: MakeJob, receivers: dict[int, Receiver]) -> Callable[..., PrefillJob]:
    def job(length: int, **changes: object) -> PrefillJob:
        values: dict[str, object] = {
            "token_ids": tuple(prompt(length, seed=length)),
            "pruning": UNCUT,
            "kv_address": receivers[length].address,
        }
        return make_job(str(length), **(values | changes))

    return job


def start_queue(model: DecoderModel, metrics: PrefillMetrics, max_open: int) -> PrefillQueue:
    queue = PrefillQueue(model, metrics, max_waiting=8, max_open=max_open, num_threads=1)
    queue.start()
    return queue


@pytest.fixture
def single(model: DecoderModel, metrics: PrefillMetrics) -> Iterator[PrefillQueue]:
    """A queue that opens one prompt at a time."""
    queue = start_queue(model, metrics, max_open=1)
    yield queue
    queue.stop()


def whole(*lengths: int) -> list[tuple[int, int]]:
    """The layers of prompts that are computed one after the other."""
    return [(length, layer_idx) for length in lengths for layer_idx in LAYERS]


def assert_exact(receiver: Receiver, model: DecoderModel, job: PrefillJob) -> None:
    """What arrived is what the prompt gives alone, to the last bit."""
    expected, result = prefill_all(model, job.token_ids, job.pruning)
    for ours, theirs in zip(receiver.layers, expected, strict=True):
        assert ours.head_lengths == theirs.head_lengths
        for name in ("keys", "values", "positions", "window_queries"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(receiver.trailers[0].final_hidden, result.final_hidden)
    assert receiver.trailers[0].report == result.report


def settings(method: str) -> PruningSettings:
    return replace(
        UNCUT, method=method, select_tokens=33, observed_layers=1, min_layer=1, latest_layer=2
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_short_prompt_is_computed_between_two_layers_of_a_long_one(
    queue: PrefillQueue,
    layers: Layers,
    model: DecoderModel,
    receivers: dict[int, Receiver],
    job_of: Callable[..., PrefillJob],
    method: str,
) -> None:
    long, short = (job_of(length, pruning=settings(method)) for length in (LONG, SHORT))
    outcomes: list[Outcome] = []
    layers.during[LONG, 0] = lambda: outcomes.append(queue.submit(short))
    queue.submit(long).result(SOON_S)
    outcomes[0].result(SOON_S)
    together = list(layers.computed)
    assert_exact(receivers[SHORT], model, short)
    alone = layers.computed[len(together) :]
    assert together[: 1 + len(alone)] == [(LONG, 0), *alone]
    assert_exact(receivers[LONG], model, long)
    assert len(layers.computed) == 2 * len(together)


def test_one_place_lets_a_long_prompt_end_first(
    single: PrefillQueue, layers: Layers, job_of: Callable[..., PrefillJob]
) -> None:
    outcomes: list[Outcome] = []
    layers.during[LONG, 1] = lambda: outcomes.extend(
        [single.submit(job_of(MIDDLE)), single.submit(job_of(SHORT))]
    )
    single.submit(job_of(LONG)).result(SOON_S)
    for outcome in outcomes:
        outcome.result(SOON_S)
    assert layers.computed == whole(LONG, SHORT, MIDDLE)


def test_places_are_taken_by_those_that_go_on_only(
    model: DecoderModel,
    metrics: PrefillMetrics,
    layers: Layers,
    job_of: Callable[..., PrefillJob],
) -> None:
    """A third prompt waits for one of two places, and is then shorter than what is left."""
    queue = start_queue(model, metrics, max_open=2)
    outcomes: list[Outcome] = []
    layers.during[LONG, 0] = lambda: outcomes.append(queue.submit(job_of(MIDDLE)))
    layers.during[MIDDLE, 1] = lambda: outcomes.append(queue.submit(job_of(SHORT)))
    queue.submit(job_of(LONG)).result(SOON_S)
    for outcome in outcomes:
        outcome.result(SOON_S)
    queue.stop()
    assert layers.computed == [(LONG, 0), *whole(MIDDLE, SHORT), *whole(LONG)[1:]]


def test_the_figures_tell_who_waits_and_who_is_open(
    model: DecoderModel,
    metrics: PrefillMetrics,
    layers: Layers,
    job_of: Callable[..., PrefillJob],
) -> None:
    queue = start_queue(model, metrics, max_open=2)
    outcomes: list[Outcome] = []
    figures: list[dict[str, float]] = []

    def read() -> None:
        text = render(metrics.registry).decode()
        names = ("waiting", "waiting_tokens", "open", "oldest_seconds")
        figures.append({name: value(text, f"winnow_prefill_{name}") for name in names})

    layers.during[LONG, 0] = lambda: outcomes.append(queue.submit(job_of(MIDDLE)))
    layers.during[MIDDLE, 0] = lambda: outcomes.append(queue.submit(job_of(SHORT)))
    layers.during[MIDDLE, 1] = read
    layers.during[LONG, 3] = read
    long = queue.submit(job_of(LONG)).result(SOON_S)
    middle, short = (outcome.result(SOON_S) for outcome in outcomes)
    queue.stop()  # the engine has taken the last one off
    read()
    ages = [figure.pop("oldest_seconds") for figure in figures]
    assert figures == [
        {"waiting": 1, "waiting_tokens": SHORT, "open": 2},
        {"waiting": 0, "waiting_tokens": 0, "open": 1},
        {"waiting": 0, "waiting_tokens": 0, "open": 0},
    ]
    assert 0 < ages[0] < ages[1]
    assert ages[2] == 0
    others_s = middle.timings.compute_s + short.timings.compute_s
    assert long.timings.queue_s >= others_s  # the long one's pause
    assert short.timings.queue_s > 0


Leave = Callable[[Outcome, set[str]], object]


def cancel(outcome: Outcome, expired: set[str]) -> None:
    outcome.cancel()


def expire(outcome: Outcome, expired: set[str]) -> None:
    expired.add(str(LONG))


@pytest.fixture
def expired(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Request ids whose deadline has passed."""
    passed: set[str] = set()
    remaining = property(lambda work: 0.0 if work.job.request_id in passed else SOON_S)
    monkeypatch.setattr(Work, "remaining_s", remaining)
    return passed


LEAVES = pytest.mark.parametrize(
    ("leave", "error", "message"),
    [(cancel, CancelledError, None), (expire, DeadlineExceeded, "30 s")],
    ids=["cancelled", "past its deadline"],
)


@LEAVES
def test_a_prompt_leaves_while_it_is_computed(
    queue: PrefillQueue,
    layers: Layers,
    metrics: PrefillMetrics,
    receivers: dict[int, Receiver],
    job_of: Callable[..., PrefillJob],
    expired: set[str],
    leave: Leave,
    error: type[Exception],
    message: str | None,
) -> None:
    submitted, outcomes = threading.Event(), list[Outcome]()

    def go() -> None:
        assert submitted.wait(SOON_S)
        assert receivers[LONG].call_begun.wait(SOON_S)  # a call that has not come has no end there
        leave(outcomes[0], expired)

    layers.during[LONG, 1] = go
    outcomes.append(queue.submit(job_of(LONG)))
    submitted.set()
    with pytest.raises(error, match=message):
        outcomes[0].result(SOON_S)
    assert receivers[LONG].call_ended.wait(SOON_S)
    queue.submit(job_of(SHORT)).result(SOON_S)
    assert layers.computed == [(LONG, 0), (LONG, 1), *whole(SHORT)]
    assert not receivers[LONG].trailers
    assert value(render(metrics.registry).decode(), "winnow_prefill_open") == 0


@LEAVES
def test_a_prompt_leaves_while_it_is_paused(
    queue: PrefillQueue,
    layers: Layers,
    model: DecoderModel,
    receivers: dict[int, Receiver],
    job_of: Callable[..., PrefillJob],
    expired: set[str],
    monkeypatch: pytest.MonkeyPatch,
    leave: Leave,
    error: type[Exception],
    message: str | None,
) -> None:
    """It ends at the next layer of another one, and frees its hidden states there."""
    runs: list[weakref.ref[PrefillRun]] = []
    held: list[bool] = []
    outcomes: list[Outcome] = []

    class Watched(PrefillRun):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            runs.append(weakref.ref(self))

    def see() -> None:
        gc.collect()
        held.append(runs[0]() is not None)

    def go() -> None:
        assert receivers[LONG].call_begun.wait(SOON_S)
        see()
        leave(long, expired)

    monkeypatch.setattr("services.prefill.engine.PrefillRun", Watched)
    layers.during[LONG, 1] = lambda: outcomes.append(queue.submit(job_of(SHORT)))
    layers.during[SHORT, 1] = go
    layers.during[SHORT, 2] = see
    long = queue.submit(job_of(LONG))
    with pytest.raises(error, match=message):
        long.result(SOON_S)
    outcomes[0].result(SOON_S)
    assert receivers[LONG].call_ended.wait(SOON_S)
    assert layers.computed == [(LONG, 0), (LONG, 1), *whole(SHORT)]
    assert held == [True, False]
    assert_exact(receivers[SHORT], model, job_of(SHORT))


@LEAVES
def test_a_prompt_leaves_while_it_waits(
    single: PrefillQueue,
    layers: Layers,
    model: DecoderModel,
    receivers: dict[int, Receiver],
    job_of: Callable[..., PrefillJob],
    expired: set[str],
    leave: Leave,
    error: type[Exception],
    message: str | None,
) -> None:
    outcomes: list[Outcome] = []
    layers.during[SHORT, 0] = lambda: outcomes.append(single.submit(job_of(LONG)))
    layers.during[SHORT, 1] = lambda: leave(outcomes[0], expired)
    layers.during[SHORT, 3] = lambda: ended.append(outcomes[0].done())
    ended: list[bool] = []
    single.submit(job_of(SHORT)).result(SOON_S)
    with pytest.raises(error, match=message):
        outcomes[0].result(SOON_S)
    assert ended == [True]  # before the other one was computed
    assert layers.computed == whole(SHORT)
    assert not receivers[LONG].headers
    assert_exact(receivers[SHORT], model, job_of(SHORT))


def test_a_prompt_that_breaks_leaves_the_others_as_they_are(
    queue: PrefillQueue,
    layers: Layers,
    model: DecoderModel,
    receivers: dict[int, Receiver],
    job_of: Callable[..., PrefillJob],
) -> None:
    def broken() -> None:
        raise RuntimeError("device lost")

    outcomes: list[Outcome] = []
    layers.during[LONG, 1] = lambda: outcomes.append(queue.submit(job_of(MIDDLE)))
    layers.during[MIDDLE, 1] = lambda: outcomes.append(queue.submit(job_of(SHORT)))
    layers.during[MIDDLE, 2] = broken
    queue.submit(job_of(LONG)).result(SOON_S)
    middle, short = outcomes
    with pytest.raises(PrefillFailed, match="device lost"):
        middle.result(SOON_S)
    short.result(SOON_S)
    for length in (LONG, SHORT):
        assert_exact(receivers[length], model, job_of(length))


def test_a_paused_prompt_whose_transfer_fails_is_not_computed_on(
    queue: PrefillQueue,
    layers: Layers,
    model: DecoderModel,
    metrics: PrefillMetrics,
    receivers: dict[int, Receiver],
    job_of: Callable[..., PrefillJob],
) -> None:
    paused, outcomes = threading.Event(), list[Outcome]()

    def refuse(layer_idx: int) -> None:
        assert paused.wait(SOON_S)
        raise StaleAttempt("attempt 2 was seen")

    def wait_for_the_refusal() -> None:
        paused.set()
        assert isinstance(long.exception(SOON_S), StaleAttempt)

    receivers[LONG].before_layer = refuse
    layers.during[LONG, 0] = lambda: outcomes.append(queue.submit(job_of(SHORT)))
    layers.during[SHORT, 0] = wait_for_the_refusal
    long = queue.submit(job_of(LONG))
    with pytest.raises(StaleAttempt):
        long.result(SOON_S)
    outcomes[0].result(SOON_S)
    assert layers.computed == [(LONG, 0), *whole(SHORT)]
    assert_exact(receivers[SHORT], model, job_of(SHORT))
    text = render(metrics.registry).decode()
    assert value(text, "winnow_prefill_failures_total", reason="stale_attempt") == 1
    assert value(text, "winnow_prefill_failures_total", reason="cancelled") == 0


def test_a_network_that_takes_nothing_holds_its_own_prompt_only(
    queue: PrefillQueue,
    model: DecoderModel,
    receivers: dict[int, Receiver],
    job_of: Callable[..., PrefillJob],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The shorter one would go on first, if its layers could leave."""
    taken, take = threading.Event(), Push._take

    def take_late(push: Push) -> Any:
        if push._kv_address == receivers[SHORT].address:
            assert taken.wait(SOON_S)
        return take(push)

    monkeypatch.setattr(Push, "_take", take_late)
    held = queue.submit(job_of(SHORT))
    queue.submit(job_of(LONG)).result(SOON_S)
    assert not held.done()
    taken.set()
    timings = held.result(SOON_S).timings
    assert timings.queue_s >= 0
    for length in (LONG, SHORT):
        assert_exact(receivers[length], model, job_of(length))


def test_stopping_fails_prompts_that_run_are_paused_or_wait(
    model: DecoderModel,
    metrics: PrefillMetrics,
    layers: Layers,
    job_of: Callable[..., PrefillJob],
) -> None:
    queue = start_queue(model, metrics, max_open=2)
    outcomes: list[Outcome] = []
    reached = threading.Event()

    def hold() -> None:
        outcomes.append(queue.submit(job_of(LONG)))
        reached.set()
        assert isinstance(outcomes[1].exception(SOON_S), PrefillFailed)  # so it has begun to stop

    layers.during[LONG, 1] = lambda: outcomes.append(queue.submit(job_of(SHORT)))
    layers.during[SHORT, 1] = hold
    paused = queue.submit(job_of(LONG))
    assert reached.wait(SOON_S)
    queue.stop()
    for outcome in (paused, *outcomes):
        with pytest.raises(PrefillFailed, match="stops"):
            outcome.result(SOON_S)


def test_every_prompt_of_a_crowd_is_delivered(
    queue: PrefillQueue,
    model: DecoderModel,
    metrics: PrefillMetrics,
    layers: Layers,
    receivers: dict[int, Receiver],
    job_of: Callable[..., PrefillJob],
) -> None:
    """As a worker that drains: it ends when each has its outcome."""
    lengths: Sequence[int] = (MIDDLE, SHORT, LONG) * 4
    outcomes: list[Outcome] = []
    layers.during[LONG, 0] = lambda: outcomes.extend(
        queue.submit(job_of(length, admitted=True)) for length in lengths
    )
    reports = [queue.submit(job_of(LONG)).result(SOON_S).report]
    reports += [outcome.result(SOON_S).report for outcome in outcomes]
    assert [report.num_prompt_tokens for report in reports] == [LONG, *lengths]
    assert len(layers.computed) == len(LAYERS) * len(reports)
    assert len(receivers[SHORT].trailers) == 4
    text = render(metrics.registry).decode()
    assert value(text, "winnow_prefill_compute_seconds_count") == len(reports)
