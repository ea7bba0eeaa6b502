"""A prompt that gives way: it is computed only while nobody else's is, and nothing counts it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from services.common.cores import SharedCores
from services.common.jobs import PrefillJob
from services.common.metrics import render
from services.prefill.metrics import PrefillMetrics
from services.prefill.queue import PrefillQueue
from tests.deadlines import SOON_S
from tests.services.exposed import samples, value
from tests.services.prefill.conftest import NUM_TOKENS, PRUNING, MakeJob
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillRun
from winnow.errors import Overloaded
from winnow.kv import LayerKV


def polite(make_job: MakeJob, **changes: object) -> PrefillJob:
    return make_job(
        "polite",
        pruning=replace(PRUNING, method="full"),
        kv_address=None,
        ticket=None,
        num_prompt_logprobs=20,
        gives_way=True,
        **changes,
    )


class Held:
    """Holds the engine in each first layer of the runs begun, until `open` is set."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()


@contextmanager
def held_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held, compute = Held(), PrefillRun.compute_layer

    def compute_held(run: PrefillRun) -> LayerKV | None:
        held.reached.set()
        assert held.open.wait(SOON_S)
        return compute(run)

    with monkeypatch.context() as patch:
        patch.setattr(PrefillRun, "compute_layer", compute_held)
        try:
            yield held
        finally:
            held.open.set()


def test_alone_it_is_computed_and_not_counted(
    queue: PrefillQueue, metrics: PrefillMetrics, make_job: MakeJob
) -> None:
    outcome = queue.submit(polite(make_job)).result(SOON_S)
    assert outcome.prompt_logprobs is not None
    assert len(outcome.prompt_logprobs.logprobs) == NUM_TOKENS - 1
    text = render(metrics.registry).decode()
    assert value(text, "winnow_prefill_compute_seconds_count") == 0
    assert value(text, "winnow_prefill_queue_seconds_count") == 0


def test_only_the_end_is_scored_where_only_that_is_wanted(
    queue: PrefillQueue, make_job: MakeJob
) -> None:
    whole = queue.submit(polite(make_job)).result(SOON_S).prompt_logprobs
    end = queue.submit(polite(make_job, scored_from=290)).result(SOON_S).prompt_logprobs
    assert whole is not None and end is not None
    assert end.logprobs == pytest.approx(whole.logprobs[290:], abs=1e-5)
    assert end.top_ids == whole.top_ids[290:]


def test_it_ends_where_another_prompt_comes(
    queue: PrefillQueue,
    metrics: PrefillMetrics,
    make_job: MakeJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with held_engine(monkeypatch) as held:
        given_way = queue.submit(polite(make_job))
        assert held.reached.wait(SOON_S)
        wanted = queue.submit(make_job("wanted"))
        held.open.set()
        with pytest.raises(Overloaded, match="other prompts"):
            given_way.result(SOON_S)
        assert wanted.result(SOON_S).report.selection_layer == 1
    failures = samples(render(metrics.registry).decode())["winnow_prefill_failures_total"]
    assert set(failures.values()) == {0}


def test_it_is_not_taken_while_another_is_computed(
    queue: PrefillQueue, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_engine(monkeypatch) as held:
        wanted = queue.submit(make_job("wanted"))
        assert held.reached.wait(SOON_S)
        with pytest.raises(Overloaded, match="other prompts"):
            queue.submit(polite(make_job))
        held.open.set()
        wanted.result(SOON_S)


def test_it_takes_no_place_in_the_queue(model: DecoderModel, make_job: MakeJob) -> None:
    """Before the engine has begun it, as many prompts find room as without it."""
    queue = PrefillQueue(model, PrefillMetrics("tiny"), max_waiting=1, max_open=4, num_threads=1)
    given_way = queue.submit(polite(make_job))
    wanted = queue.submit(make_job("wanted"))
    with pytest.raises(Overloaded, match="1 prompts wait for prefill; the limit is 1"):
        queue.submit(make_job("too many"))
    queue.start()
    assert isinstance(given_way.exception(SOON_S), Overloaded)
    assert wanted.result(SOON_S).report.selection_layer == 1
    queue.stop()


class _CountingCores(SharedCores):
    def __init__(self) -> None:
        self.num_layers = 0

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        self.num_layers += 1
        yield

    def close(self) -> None:
        """Nothing is open."""


def test_decode_on_the_same_cores_keeps_its_pace(model: DecoderModel, make_job: MakeJob) -> None:
    cores = _CountingCores()
    queue = PrefillQueue(
        model, PrefillMetrics("tiny"), max_waiting=1, max_open=4, num_threads=1, cores=cores
    )
    queue.start()
    queue.submit(polite(make_job)).result(SOON_S)
    assert cores.num_layers == 0
    queue.submit(replace(polite(make_job), gives_way=False)).result(SOON_S)
    assert cores.num_layers > 0
    queue.stop()
