"""A decode worker is lost under a prompt, and another one takes over."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from services.common.registry import WorkerRecord
from services.decode import take_over
from services.decode.take_over import Fetcher
from services.decode.worker import DecodeWorker
from services.gateway.request import generation_run
from services.gateway.request.generation_run import PromptRun
from services.gateway.request.run import Service
from services.gateway.request.states import State
from tests.deadlines import SOON_S
from tests.models_in_code import save_tiny_model
from tests.services.exposed import value
from tests.services.gateway.request.prompt_runs import (
    LARGE,
    REQUEST,
    answers,
    break_off,
    complete,
    kill_worker_of,
    make_run,
    parts_of,
    small_and_large,
    worker_of,
)
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from winnow.errors import (
    DeliveryFailed,
    EngineFailed,
    NoDecodeWorker,
    NotFinite,
    TransferDamaged,
    UnknownReservation,
    WinnowError,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = replace(
    REQUEST, num_sequences=2, sampling=replace(REQUEST.sampling, max_tokens=500, temperature=0.8)
)


@pytest_asyncio.fixture(loop_scope="module")
async def parts(several: TestService) -> AsyncIterator[Service]:
    async with parts_of(several) as parts:
        yield parts


async def test_the_answer_is_what_it_would_have_been(several: TestService, parts: Service) -> None:
    expected = await answers(several, make_run(parts, LONG))
    run = make_run(parts, LONG)
    assert await answers(several, run, harm_after=20) == expected
    assert run.state is State.FINISHED
    assert (run.stats.migrations, run.stats.attempts) == (1, 2)
    await several.until_idle()


@pytest.mark.parametrize("error", [DeliveryFailed("refused"), UnknownReservation("gone")])
async def test_a_worker_that_takes_no_kv_is_left(
    several: TestService, parts: Service, error: WinnowError
) -> None:
    expected = await complete(make_run(parts))
    several.prefiller.failures = [error]
    run = make_run(parts)
    assert await complete(run) == expected
    assert [job.attempt for job in several.prefiller.jobs[-2:]] == [1, 1]
    first, second = (job.kv_address for job in several.prefiller.jobs[-2:])
    assert first != second
    await several.until_idle()


async def test_a_worker_lost_during_prefill_is_replaced(
    several: TestService, parts: Service
) -> None:
    expected = await complete(make_run(parts))
    several.prefiller.hold_jobs()
    run = make_run(parts)
    running = asyncio.create_task(complete(run))
    await several.prefiller.asked.wait()
    await kill_worker_of(several, run)
    await several.prefiller.cancelled.wait()
    several.prefiller.hold.set()
    assert await running == expected
    await several.until_idle()


async def test_a_full_prefill_queue_does_not_end_a_prompt_that_runs(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowded = running_service(model_path, redis_url, num_workers=2, max_waiting_prefills=1)
    async with crowded as service, parts_of(service) as parts:
        expected = await answers(service, make_run(parts, LONG))
        prefiller, queue = service.prefiller, service.prefiller.queue
        computing, is_open = threading.Event(), threading.Event()
        run_layer = queue._model.layer

        def wait_and_run(*arguments: Any) -> torch.Tensor:
            computing.set()
            assert is_open.wait(20)
            return run_layer(*arguments)

        async def crowd_and_kill(service: TestService, run: PromptRun) -> None:
            monkeypatch.setattr(queue._model, "layer", wait_and_run)
            other = replace(prefiller.jobs[-1], kv_address="127.0.0.1:1")
            queue.submit(other)
            assert await asyncio.to_thread(computing.wait, 20)
            queue.submit(other)
            prefiller.asked.clear()
            opening.append(asyncio.create_task(open_when_asked()))
            await kill_worker_of(service, run)

        async def open_when_asked() -> None:
            await prefiller.asked.wait()
            is_open.set()

        opening: list[asyncio.Task[None]] = []

        run = make_run(parts, LONG)
        assert await answers(service, run, harm_after=20, harm=crowd_and_kill) == expected
        await service.until_idle()


@pytest.mark.parametrize(
    "ending", [{}, {"stop_token_ids": [2, 300], "min_tokens": 300, "ignore_eos": False}]
)
async def test_a_client_sees_one_stream(
    model_path: Path, redis_url: str, ending: dict[str, Any]
) -> None:
    async with running_service(model_path, redis_url, num_workers=2) as service:

        async def stream(kill: bool) -> tuple[str, list[float]]:
            text, logprobs = "", list[float]()
            chunks = await service.openai.completions.create(
                model=MODEL_NAME,
                prompt="a b c d",
                max_tokens=500,
                seed=3,
                logprobs=1,
                stream=True,
                extra_body={"ignore_eos": True} | ending,
            )
            async for chunk in chunks:
                text += chunk.choices[0].text
                found = chunk.choices[0].logprobs
                logprobs += found.token_logprobs or [] if found else []
                if kill and len(logprobs) > 10:
                    kill = False
                    (busy,) = (w for w in service.workers if w.engine.stats().running_sequences)
                    await break_off(busy)
                    service.workers.remove(busy)
            return text, logprobs

        expected = await stream(kill=False)
        assert await stream(kill=True) == expected
        metrics = (await service.admin.get("/metrics")).text
        reasons = ("no_decode_worker", "engine_failed")
        moved = [value(metrics, "winnow_migrations_total", reason=reason) for reason in reasons]
        assert sum(moved) == 1
        await service.until_idle()


async def test_broken_numbers_and_endless_losses_end_the_prompt(
    several: TestService, parts: Service
) -> None:
    run = make_run(parts)
    error = NotFinite("the logits are not finite")
    with pytest.raises(NotFinite):
        await run._recover(error)
    run.stats.migrations = generation_run.MAX_MIGRATIONS
    with pytest.raises(EngineFailed, match="broke again"):
        await run._recover(EngineFailed("broke again"))


async def test_without_another_worker_the_loss_is_told(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_run, "_PATIENCE_S", 0.5)
    async with running_service(model_path, redis_url) as service, parts_of(service) as alone:
        with pytest.raises(NoDecodeWorker):
            await answers(service, make_run(alone, LONG), harm_after=5)
        peers = alone.router._peers.values()
        assert {(peer.num_places, peer.pages_held) for peer in peers} <= {(0, 0)}


async def test_a_prompt_that_outlives_the_only_worker_it_fits_waits_for_another(
    model_path: Path, redis_url: str
) -> None:
    async with small_and_large(model_path, redis_url) as (service, parts, large):
        expected = await answers(service, make_run(parts, LARGE))
        another = DecodeWorker(large._settings)

        async def replace_large(*_: object) -> None:
            await break_off(large)
            starting.append(asyncio.create_task(start_another()))

        async def start_another() -> None:
            await asyncio.sleep(1)  # the small one is asked meanwhile
            await another.start()

        starting: list[asyncio.Task[None]] = []
        run = make_run(parts, LARGE)
        try:
            assert await answers(service, run, harm_after=5, harm=replace_large) == expected
            assert run.stats.migrations == 1
        finally:
            await starting[0]
            await another.stop()


async def drain_worker_of(service: TestService, run: PromptRun) -> None:
    """As on SIGTERM: it returns when the worker may be stopped."""
    draining.append(asyncio.create_task(worker_of(service, run).drain(60)))


draining: list[asyncio.Task[int]] = []


async def drained(model_path: Path, redis_url: str, **changes: Any) -> tuple[PromptRun, bool]:
    """A run whose worker drains, and whether its answer was the one that it would have been."""
    async with running_service(model_path, redis_url, **changes) as service:
        async with parts_of(service) as parts:
            expected = await answers(service, make_run(parts, LONG))
            run = make_run(parts, LONG)
            got = await answers(service, run, harm_after=20, harm=drain_worker_of)
        assert await draining.pop() == 0
        await service.until_idle()
        metrics = (await service.admin.get("/metrics")).text
        assert value(metrics, "winnow_move_seconds_count") == run.stats.moves
    return run, got == expected


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
async def test_a_prompt_moves_off_a_draining_worker_with_its_kv(
    model_path: Path, redis_url: str, kv_dtype: str
) -> None:
    run, is_right = await drained(model_path, redis_url, num_workers=2, kv_dtype=kv_dtype)
    assert is_right
    stats = run.stats
    assert (stats.moves, stats.migrations, stats.attempts) == (1, 0, 1)  # one prefill


async def test_recurrent_layers_move_with_their_states(tmp_path: Path, redis_url: str) -> None:
    model_path = save_tiny_model(tmp_path, "qwen3_next")
    run, is_right = await drained(model_path, redis_url, num_workers=2)
    assert is_right
    assert (run.stats.moves, run.stats.attempts) == (1, 1)


async def test_recurrent_layers_go_through_replayed_tokens(tmp_path: Path, redis_url: str) -> None:
    model_path = save_tiny_model(tmp_path, "qwen3_next")
    async with (
        running_service(model_path, redis_url, num_workers=2) as service,
        parts_of(service) as parts,
    ):
        expected = await answers(service, make_run(parts, LONG))
        run = make_run(parts, LONG)
        assert await answers(service, run, harm_after=20) == expected
    assert (run.stats.moves, run.stats.migrations) == (0, 1)


async def test_a_prompt_without_another_worker_ends_where_it_is(
    model_path: Path, redis_url: str
) -> None:
    run, is_right = await drained(model_path, redis_url, num_workers=1)
    assert is_right
    assert run.stats.moves == 0


async def test_a_move_that_breaks_off_is_made_good_by_replay(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise TransferDamaged("a bit flipped")

    monkeypatch.setattr(take_over._Arrivals, "end", breaks)
    run, is_right = await drained(model_path, redis_url, num_workers=2)
    assert is_right
    stats = run.stats
    assert (stats.moves, stats.migrations, stats.attempts) == (0, 1, 2)


async def test_a_worker_that_cannot_fetch_is_followed_by_one_that_can(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.request.decode_calls._PAUSE_S", 0.02)
    fetch, tries = Fetcher._fetch, []

    def fails_once(self: Fetcher, *arguments: Any) -> None:
        tries.append(arguments)
        if len(tries) == 1:
            raise NoDecodeWorker("no route to the host")
        fetch(self, *arguments)

    monkeypatch.setattr(Fetcher, "_fetch", fails_once)
    run, is_right = await drained(model_path, redis_url, num_workers=2)
    assert is_right
    assert len(tries) == 2
    assert (run.stats.moves, run.stats.migrations) == (1, 0)


async def test_who_leaves_while_a_worker_is_sought_leaves_nothing(
    model_path: Path, redis_url: str
) -> None:
    several = running_service(model_path, redis_url, num_workers=2)
    async with several as service, parts_of(service) as parts:
        for num_steps in (1, 2, 3, 5, 8):
            run = make_run(parts, LONG)
            async with run:
                await run.admit()
                async with aclosing(run.tokens()) as steps:
                    await anext(steps)
                    run._calls.begin_move(LONG)
                    for _ in range(num_steps):
                        await anext(steps)
            await service.until_idle()
        peers = parts.router._peers.values()
        assert {(peer.num_places, peer.pages_held) for peer in peers} <= {(0, 0)}


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancel_that_is_lost_while_a_worker_is_sought_leaves_nothing(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """As asyncio.wait_for may lose it; who leaves may be cancelled once more meanwhile."""
    sought = asyncio.Event()

    async def no_candidates() -> list[WorkerRecord]:
        if not sought.is_set():
            sought.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        return []

    async def leave_while_sought(run: PromptRun, parts: Service) -> None:
        async with run:
            await run.admit()
            async with aclosing(run.tokens()) as steps:
                await anext(steps)
                monkeypatch.setattr(parts.router, "candidates", no_candidates)
                run._calls.begin_move(LONG)
                await sought.wait()
                await asyncio.Event().wait()

    async with running_service(model_path, redis_url) as service, parts_of(service) as parts:
        leaving = asyncio.create_task(leave_while_sought(make_run(parts, LONG), parts))
        await sought.wait()
        for _ in range(times):
            leaving.cancel()
            await asyncio.wait({leaving}, timeout=0.2)
        await asyncio.wait({leaving}, timeout=SOON_S)
        assert leaving.cancelled()
        peers = parts.router._peers.values()
        assert {(peer.num_places, peer.pages_held) for peer in peers} <= {(0, 0)}
        await service.until_idle()


async def test_a_prompt_that_is_given_up_for_want_of_memory_is_computed_anew(
    model_path: Path, redis_url: str
) -> None:
    tight = {"kv_memory_bytes": 1 << 20, "kv_overcommit": 4, "swap_bytes": 0}
    async with running_service(model_path, redis_url, **tight) as service:
        async with parts_of(service) as parts:
            request = replace(LONG, num_sequences=1)
            alone = await answers(service, make_run(parts, request))
            runs = [make_run(parts, replace(request, request_id=f"p{i}")) for i in range(3)]
            got = await asyncio.gather(*(answers(service, run) for run in runs))
            assert got == [alone] * 3
            assert sum(run.stats.migrations for run in runs) > 0
        await service.until_idle()
