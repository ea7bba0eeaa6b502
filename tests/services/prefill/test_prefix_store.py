"""A prefill worker with a prefix store: what it is used for, what is counted, what is let go."""

import threading
from collections.abc import Iterator

import pytest

from services.common.metrics import render
from services.common.routing_stats import RoutingStats, short_hash
from services.prefill.metrics import PrefillMetrics
from services.prefill.queue import PrefillQueue
from tests.deadlines import SOON_S
from tests.services.exposed import value
from tests.services.prefill.conftest import NUM_TOKENS, MakeJob
from tests.services.prefill.receiver import Receiver
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillRun
from winnow.engine.prefix.hashes import block_hashes, prefix_salt
from winnow.engine.prefix.store import PrefixStore
from winnow.kv import LayerKV
from winnow.pruning_settings import PruningSettings

BLOCK = 64
NUM_CACHED = NUM_TOKENS // BLOCK * BLOCK


def open_store(model: DecoderModel, num_prompts: float = 4.0) -> PrefixStore:
    """A store with room for the layers up to the cut of so many prompts."""
    shape = model.shape
    layer_bytes = shape.kv_bytes(shape.num_kv_heads) * NUM_CACHED
    hidden_bytes = shape.hidden_size * shape.dtype.itemsize * NUM_CACHED
    max_bytes = int(num_prompts * (2 * layer_bytes + hidden_bytes))
    return PrefixStore(model, max_bytes, block_tokens=BLOCK)


@pytest.fixture
def store(model: DecoderModel) -> PrefixStore:
    return open_store(model)


def start_queue(model: DecoderModel, metrics: PrefillMetrics, store: PrefixStore) -> PrefillQueue:
    queue = PrefillQueue(model, metrics, max_waiting=8, max_open=4, num_threads=1, store=store)
    queue.start()
    return queue


@pytest.fixture
def queue(
    model: DecoderModel, metrics: PrefillMetrics, store: PrefixStore
) -> Iterator[PrefillQueue]:
    queue = start_queue(model, metrics, store)
    yield queue
    queue.stop()


def figures(metrics: PrefillMetrics) -> dict[str, float]:
    text = render(metrics.registry).decode()
    names = ("looked_up_tokens_total", "hit_tokens_total", "evicted_blocks_total", "blocks")
    return {name: value(text, f"winnow_prefix_{name}") for name in names}


def test_counts_what_was_looked_up_and_hit(
    queue: PrefillQueue, metrics: PrefillMetrics, make_job: MakeJob, store: PrefixStore
) -> None:
    for idx in range(3):
        queue.submit(make_job(f"r{idx}")).result(SOON_S)
    assert figures(metrics) == {
        "looked_up_tokens_total": 3 * NUM_TOKENS,
        "hit_tokens_total": 2 * NUM_CACHED,
        "evicted_blocks_total": 0,
        "blocks": NUM_CACHED // BLOCK,
    }
    text = render(metrics.registry).decode()
    stats = store.stats()
    assert value(text, "winnow_prefix_resident_bytes") == stats.used_bytes > 0
    assert value(text, "winnow_prefix_limit_bytes") == stats.max_bytes


def test_counts_evictions(model: DecoderModel, metrics: PrefillMetrics, make_job: MakeJob) -> None:
    queue = start_queue(model, metrics, open_store(model, num_prompts=1))
    for idx in range(3):
        token_ids = tuple(range(1 + idx, NUM_TOKENS + 1 + idx))
        queue.submit(make_job(f"r{idx}", token_ids=token_ids)).result(SOON_S)
    assert figures(metrics)["evicted_blocks_total"] == 2 * NUM_CACHED // BLOCK
    queue.stop()


def test_another_salt_shares_nothing(queue: PrefillQueue, make_job: MakeJob) -> None:
    cached = [
        queue.submit(make_job(f"r{idx}", cache_salt=salt)).result(SOON_S).report.num_cached_tokens
        for idx, salt in enumerate(("", "a", "b", "a", ""))
    ]
    assert cached == [0, 0, 0, NUM_CACHED, NUM_CACHED]


def test_prompts_that_are_scored_neither_use_nor_fill_it(
    queue: PrefillQueue, make_job: MakeJob, store: PrefixStore
) -> None:
    scored = make_job(
        kv_address=None, ticket=None, num_prompt_logprobs=0, pruning=PruningSettings(method="full")
    )
    for _ in range(2):
        report = queue.submit(scored).result(SOON_S).report
        assert (report.num_cached_tokens, report.no_prefix_reason) == (0, "off")
    assert store.stats().num_blocks == 0


def test_tells_routers_the_blocks_it_holds_by_their_hashes(
    queue: PrefillQueue, make_job: MakeJob, model: DecoderModel
) -> None:
    job = make_job(cache_salt="ours")
    queue.submit(job).result(SOON_S)
    stats = queue.routing_stats()
    assert stats is not None
    hashes = block_hashes(job.token_ids, prefix_salt(model.fingerprint, "ours"), stats.block_tokens)
    assert (stats.fingerprint, stats.block_tokens) == (model.fingerprint, BLOCK)
    assert set(stats.blocks) == set(map(short_hash, hashes))
    assert stats.work == {}


def test_tells_routers_what_is_still_to_be_computed(
    queue: PrefillQueue, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one prompt whose first layer has been computed, and of others that wait."""
    reports: list[RoutingStats | None] = []
    compute_layer = PrefillRun.compute_layer

    def report(run: PrefillRun) -> LayerKV | None:
        layer = compute_layer(run)
        if not reports:
            queue.submit(make_job("waits", cache_salt="another"))
            queue.submit(make_job("follows"))
            reports.append(queue.routing_stats())
        return layer

    monkeypatch.setattr(PrefillRun, "compute_layer", report)
    queue.submit(make_job("runs")).result(SOON_S)
    (stats,) = reports
    assert stats is not None
    assert 0 < stats.work["runs"] < NUM_TOKENS
    assert stats.work["waits"] == NUM_TOKENS
    assert stats.work["follows"] == NUM_TOKENS - NUM_CACHED


def test_without_a_store_there_is_nothing_to_route_by(
    model: DecoderModel, metrics: PrefillMetrics
) -> None:
    queue = PrefillQueue(model, metrics, max_waiting=8, max_open=4, num_threads=1)
    assert queue.routing_stats() is None


def test_a_cancelled_prompt_lets_go_of_its_blocks_and_the_next_uses_them(
    queue: PrefillQueue,
    make_job: MakeJob,
    store: PrefixStore,
    model: DecoderModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, go_on = threading.Event(), threading.Event()
    compute = model.layer

    def layer(layer_idx: int, *given: object) -> object:
        if layer_idx == 1:
            held.set()
            assert go_on.wait(SOON_S)
        return compute(layer_idx, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "layer", layer)
    cancelled = queue.submit(make_job("cancelled"))
    assert held.wait(SOON_S)
    cancelled.cancel()
    go_on.set()
    report = queue.submit(make_job("next")).result(SOON_S).report
    assert report.num_cached_tokens == NUM_CACHED
    assert store.stats().num_blocks_in_use == 0


def test_a_prompt_whose_worker_is_away_leaves_the_store_in_order(
    queue: PrefillQueue, make_job: MakeJob, store: PrefixStore, receiver: Receiver
) -> None:
    lost = queue.submit(make_job("lost", kv_address="127.0.0.1:1"))
    assert lost.exception(SOON_S) is not None
    report = queue.submit(make_job("next")).result(SOON_S).report
    assert report.num_cached_tokens in range(0, NUM_CACHED + 1, BLOCK)
    assert store.stats().num_blocks_in_use == 0
