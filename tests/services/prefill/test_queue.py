"""Prompts through the queue, the engine thread and a real push."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from services.common.cores import SharedCores
from services.common.metrics import render
from services.prefill import engine
from services.prefill.metrics import PrefillMetrics
from services.prefill.queue import PrefillQueue
from tests.deadlines import SOON_S
from tests.services.exposed import samples, value
from tests.services.prefill.conftest import NUM_TOKENS, PRUNING, MakeJob, until
from tests.services.prefill.receiver import Receiver
from tests.winnow.drive import prefill_all
from winnow.decoder import DecoderModel
from winnow.engine.prompt_logprobs import PromptLogprobsRun
from winnow.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PrefillFailed,
    PrefillLost,
    StaleAttempt,
)


class Gate:
    """Holds the receiver at a layer until it is opened."""

    def __init__(self, receiver: Receiver, layer_idx: int = 0) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self._layer_idx = layer_idx
        receiver.before_layer = self._wait

    def _wait(self, layer_idx: int) -> None:
        if layer_idx == self._layer_idx:
            self.reached.set()
            assert self.open.wait(SOON_S)


class EngineGate:
    """Holds the engine's thread at its next layer until it is opened."""

    def __init__(self, model: DecoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self._run_layer = model.layer
        monkeypatch.setattr(model, "layer", self._wait)

    def _wait(self, *given: Any) -> torch.Tensor:
        self.reached.set()
        assert self.open.wait(SOON_S)
        return self._run_layer(*given)


def test_delivers_every_layer_and_the_report(
    queue: PrefillQueue, receiver: Receiver, make_job: MakeJob, model: DecoderModel
) -> None:
    job = make_job()
    outcome = queue.submit(job).result(SOON_S)
    expected, _ = prefill_all(model, job.token_ids, PRUNING)
    assert [layer.layer_idx for layer in receiver.layers] == [0, 1, 2, 3]
    for ours, theirs in zip(receiver.layers, expected, strict=True):
        assert ours.head_lengths == theirs.head_lengths
        for name in ("keys", "values", "positions", "window_queries"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert receiver.headers[0].num_prompt_tokens == NUM_TOKENS
    assert receiver.trailers[0].report == outcome.report
    assert outcome.report.selection_layer == 1


def test_reports_scores_to_whom_asks_for_them(queue: PrefillQueue, make_job: MakeJob) -> None:
    assert queue.submit(make_job()).result(SOON_S).scores is None
    scores = queue.submit(make_job("r2", explains=True)).result(SOON_S).scores
    assert scores is not None
    assert scores.layer_idx == PRUNING.fixed_layer
    assert len(scores.scores) == NUM_TOKENS - PRUNING.window_size
    num_selected = (scores.last_layers > PRUNING.fixed_layer).sum()
    assert num_selected == PRUNING.select_tokens


def test_timings_add_up(queue: PrefillQueue, receiver: Receiver, make_job: MakeJob) -> None:
    timings = queue.submit(make_job()).result(SOON_S).timings
    payload = sum(layer.nbytes + layer.window_queries.nbytes for layer in receiver.layers)
    assert payload < timings.wire_bytes < payload + 4096
    assert timings.compute_s > 0
    assert 0 < timings.exposed_transfer_s <= timings.transfer_s
    assert 0 <= timings.queue_s < SOON_S


def test_counts_what_it_did(
    queue: PrefillQueue, metrics: PrefillMetrics, make_job: MakeJob
) -> None:
    queue.submit(make_job()).result(SOON_S)
    text = render(metrics.registry).decode()
    assert value(text, "winnow_transfer_seconds_count") == 1.0
    assert value(text, "winnow_prefill_layer_seconds_count") == queue._model.shape.num_layers
    assert value(text, "winnow_transfers_in_flight") == 0.0
    assert samples(text)["winnow_prefill_waiting_tokens"] == {(): 0.0}


def test_prompts_are_served_in_order(
    queue: PrefillQueue, receiver: Receiver, make_job: MakeJob
) -> None:
    outcomes = [queue.submit(make_job("first")), queue.submit(make_job("second"))]
    for outcome in outcomes:
        outcome.result(SOON_S)
    assert [header.request_id for header in receiver.headers] == ["first", "second"]


def test_computes_the_next_prompt_while_a_push_ends(
    queue: PrefillQueue, receiver: Receiver, make_job: MakeJob, model: DecoderModel
) -> None:
    gate = Gate(receiver, layer_idx=3)
    held = queue.submit(make_job("held"))
    assert gate.reached.wait(SOON_S)
    other = Receiver(model, NUM_TOKENS)
    queue.submit(make_job("next", kv_address=other.address)).result(SOON_S)
    assert not held.done()
    gate.open.set()
    held.result(SOON_S)
    other.stop()


def test_refuses_more_prompts_than_may_wait(
    queue: PrefillQueue, model: DecoderModel, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = EngineGate(model, monkeypatch)
    running = queue.submit(make_job("running"))
    assert gate.reached.wait(SOON_S)
    waiting = [queue.submit(make_job("w1")), queue.submit(make_job("w2"))]
    with pytest.raises(Overloaded, match="the limit is 2"):
        queue.submit(make_job("refused"))
    queue.submit(make_job("admitted before", admitted=True)).cancel()
    waiting[0].cancel()
    queue.submit(make_job("takes its place")).cancel()
    gate.open.set()
    running.result(SOON_S)
    waiting[1].result(SOON_S)


def test_cancelling_stops_compute_and_transfer(
    queue: PrefillQueue, receiver: Receiver, make_job: MakeJob
) -> None:
    gate = Gate(receiver)
    outcome = queue.submit(make_job())
    assert gate.reached.wait(SOON_S)
    outcome.cancel()
    assert receiver.call_ended.wait(SOON_S)
    gate.open.set()
    queue.submit(make_job("next")).result(SOON_S)
    with pytest.raises(CancelledError):
        outcome.result()
    assert len(receiver.trailers) == 1


def test_cancelling_in_a_first_pass_ends_it_there(
    queue: PrefillQueue, model: DecoderModel, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a first pass is handed over, so no push could notice."""
    run_layer, computed = model.layer, []
    submitted = threading.Event()

    def cancelling(layer_idx: int, *rest: Any) -> torch.Tensor:
        computed.append(layer_idx)
        assert submitted.wait(SOON_S)
        if layer_idx == 1:
            outcome.cancel()
        return run_layer(layer_idx, *rest)

    monkeypatch.setattr(model, "layer", cancelling)
    outcome = queue.submit(
        make_job(pruning=replace(PRUNING, method="gemfilter", fixed_layer=2, select_tokens=64))
    )
    submitted.set()
    with pytest.raises(CancelledError):
        outcome.result(SOON_S)
    queue.submit(make_job("next")).result(SOON_S)
    assert computed == [0, 1, 0, 1, 2, 3]


def test_a_refusal_keeps_its_class(
    queue: PrefillQueue, receiver: Receiver, make_job: MakeJob, metrics: PrefillMetrics
) -> None:
    def refuse(layer_idx: int) -> None:
        raise StaleAttempt("attempt 2 was seen")

    receiver.before_layer = refuse
    with pytest.raises(StaleAttempt, match="attempt 2 was seen"):
        queue.submit(make_job()).result(SOON_S)
    text = render(metrics.registry).decode()
    assert value(text, "winnow_prefill_failures_total", reason="stale_attempt") == 1.0
    assert value(text, "winnow_transfers_in_flight") == 0.0


def test_an_unreachable_worker_is_a_failed_prefill(queue: PrefillQueue, make_job: MakeJob) -> None:
    with pytest.raises(PrefillFailed, match=r"127\.0\.0\.1:1"):
        queue.submit(make_job(kv_address="127.0.0.1:1")).result(SOON_S)


def test_a_worker_that_dies_midway_is_a_failed_prefill_and_can_come_back(
    queue: PrefillQueue, receiver: Receiver, make_job: MakeJob, model: DecoderModel
) -> None:
    gate = Gate(receiver)
    outcome = queue.submit(make_job())
    assert gate.reached.wait(SOON_S)
    gate.open.set()
    receiver.before_layer = lambda layer_idx: receiver.stop()
    with pytest.raises(PrefillFailed, match="could not be delivered"):
        outcome.result(SOON_S)
    other = Receiver(model, NUM_TOKENS)
    queue.submit(make_job(kv_address=other.address)).result(SOON_S)
    other.stop()


def test_a_prompt_ends_at_its_deadline(
    queue: PrefillQueue, receiver: Receiver, make_job: MakeJob
) -> None:
    gate = Gate(receiver)
    with pytest.raises(DeadlineExceeded):
        queue.submit(make_job(deadline_s=0.3)).result(SOON_S)
    gate.open.set()


def test_a_prompt_whose_deadline_passed_in_the_queue_costs_no_compute(
    queue: PrefillQueue, receiver: Receiver, make_job: MakeJob
) -> None:
    with pytest.raises(DeadlineExceeded, match="waited"):
        queue.submit(make_job(deadline_s=0.0)).result(SOON_S)
    assert receiver.headers == []


def test_a_bad_prompt_is_refused_and_the_next_one_served(
    queue: PrefillQueue, make_job: MakeJob
) -> None:
    with pytest.raises(InvalidRequest, match="token id 999999"):
        queue.submit(make_job(token_ids=(999_999,) * NUM_TOKENS)).result(SOON_S)
    queue.submit(make_job()).result(SOON_S)


def test_stopping_fails_what_waits_and_what_runs(
    model: DecoderModel, metrics: PrefillMetrics, receiver: Receiver, make_job: MakeJob
) -> None:
    queue = PrefillQueue(model, metrics, max_waiting=2, max_open=4, num_threads=1)
    queue.start()
    gate = Gate(receiver)
    running = queue.submit(make_job("running"))
    assert gate.reached.wait(SOON_S)
    waiting = queue.submit(make_job("waiting"))
    queue.stop()
    gate.open.set()
    for outcome in (running, waiting):
        with pytest.raises(PrefillFailed):
            outcome.result(SOON_S)
    with pytest.raises(PrefillFailed, match="stops"):
        queue.submit(make_job("late"))
    assert not queue.alive


def test_a_worker_that_answers_too_early_is_a_failed_prefill(
    queue: PrefillQueue, receiver: Receiver, make_job: MakeJob
) -> None:
    receiver.stop_after_layer = 0
    with pytest.raises(PrefillFailed):
        queue.submit(make_job()).result(SOON_S)


SCORED: dict[str, Any] = {
    "kv_address": None,
    "ticket": None,
    "pruning": replace(PRUNING, method="full"),
    "num_prompt_logprobs": 2,
}


def test_a_prompt_that_is_only_scored_is_sent_to_nobody(
    queue: PrefillQueue, metrics: PrefillMetrics, receiver: Receiver, make_job: MakeJob
) -> None:
    outcome = queue.submit(make_job(**SCORED)).result(SOON_S)
    assert outcome.prompt_logprobs is not None
    assert len(outcome.prompt_logprobs.logprobs) == NUM_TOKENS - 1
    assert {len(ids) for ids in outcome.prompt_logprobs.top_ids} == {2}
    assert (outcome.timings.wire_bytes, outcome.timings.transfer_s) == (0, 0)
    assert outcome.report.no_selection_reason == "off"
    assert receiver.headers == []
    text = render(metrics.registry).decode()
    assert value(text, "winnow_prefill_compute_seconds_count") == 1.0
    assert value(text, "winnow_transfer_seconds_count") == 0.0


def test_a_prompt_that_is_also_generated_from_is_scored_before_its_end_is_sent(
    queue: PrefillQueue, receiver: Receiver, make_job: MakeJob
) -> None:
    alone = queue.submit(make_job("alone", **SCORED)).result(SOON_S)
    job = make_job("both", pruning=SCORED["pruning"], num_prompt_logprobs=2)
    both = queue.submit(job).result(SOON_S)
    assert both.prompt_logprobs == alone.prompt_logprobs
    assert len(receiver.trailers) == 1
    plain = queue.submit(make_job("plain")).result(SOON_S)
    assert plain.prompt_logprobs is None


def test_cancelling_between_two_blocks_of_log_probabilities_ends_it_there(
    queue: PrefillQueue, model: DecoderModel, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, blocks = model.logits, []
    submitted = threading.Event()

    def cancelling(hidden: torch.Tensor) -> torch.Tensor:
        blocks.append(len(hidden))
        assert submitted.wait(SOON_S)
        outcome.cancel()
        return logits(hidden)

    small_blocks = partial(PromptLogprobsRun, max_logits=100 * model.vocab_size)
    monkeypatch.setattr("services.prefill.engine.PromptLogprobsRun", small_blocks)
    monkeypatch.setattr(model, "logits", cancelling)
    outcome = queue.submit(make_job(**SCORED))
    submitted.set()
    with pytest.raises(CancelledError):
        outcome.result(SOON_S)
    queue.submit(make_job("next")).result(SOON_S)
    assert blocks == [100]


@pytest.fixture
def seen(tmp_path: Path) -> Iterator[SharedCores]:
    """The cores as a decode worker sees them."""
    cores = SharedCores(tmp_path / "cores")
    yield cores
    cores.close()


def test_decode_sees_that_layers_are_computed_and_not_that_a_push_ends(
    model: DecoderModel,
    metrics: PrefillMetrics,
    receiver: Receiver,
    make_job: MakeJob,
    seen: SharedCores,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computing = []
    layer = DecoderModel.layer

    def watched(*args: Any) -> torch.Tensor:
        computing.append(seen.prefill_runs)
        return layer(*args)

    monkeypatch.setattr(DecoderModel, "layer", watched)
    gate = Gate(receiver, layer_idx=3)
    cores = SharedCores(tmp_path / "cores")
    queue = PrefillQueue(model, metrics, max_waiting=2, max_open=4, num_threads=1, cores=cores)
    queue.start()
    held = queue.submit(make_job())
    assert gate.reached.wait(SOON_S)
    assert computing == [True] * model.shape.num_layers
    assert not seen.prefill_runs
    gate.open.set()
    held.result(SOON_S)
    queue.stop()
    assert not seen.prefill_runs


def test_decode_sees_no_prompt_that_failed(
    model: DecoderModel,
    metrics: PrefillMetrics,
    make_job: MakeJob,
    seen: SharedCores,
    tmp_path: Path,
) -> None:
    cores = SharedCores(tmp_path / "cores")
    queue = PrefillQueue(model, metrics, max_waiting=2, max_open=4, num_threads=1, cores=cores)
    queue.start()
    with pytest.raises(InvalidRequest):
        queue.submit(make_job(token_ids=(999_999,) * NUM_TOKENS)).result(SOON_S)
    queue.stop()
    assert not seen.prefill_runs


@pytest.mark.parametrize(
    ("error", "works"), [(torch.OutOfMemoryError("full"), True), (RuntimeError("lost"), False)]
)
def test_a_device_whose_memory_is_full_has_not_failed(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError, works: bool
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    device = torch.device("cpu")
    assert engine._works(device)
    monkeypatch.setattr(torch, "ones", fail)
    assert engine._works(device) == works


def test_a_device_that_fails_ends_the_worker_and_a_prompt_that_breaks_does_not(
    queue: PrefillQueue,
    make_job: MakeJob,
    model: DecoderModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken() -> None:
        with pytest.raises(PrefillFailed, match="out of memory"):
            queue.submit(make_job()).result(SOON_S)

    compute = model.layer
    monkeypatch.setattr(model, "layer", fail)
    for _ in range(12):
        broken()
    monkeypatch.setattr(model, "layer", compute)
    queue.submit(make_job()).result(SOON_S)
    monkeypatch.setattr(model, "layer", fail)
    monkeypatch.setattr("services.prefill.engine._works", lambda device: device != model.device)
    broken()
    until(lambda: not queue.alive)
    with pytest.raises(PrefillLost, match="the prefill engine has ended"):
        queue.submit(make_job())
