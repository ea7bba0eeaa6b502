"""A decode worker is lost under a prompt, and another one takes over."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from services.gateway import lifecycle
from services.gateway.lifecycle import PromptRun, Service
from services.gateway.states import State
from tests.services.exposed import value
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from tests.services.gateway.test_lifecycle import REQUEST, complete, make_run, parts_of
from winnow.errors import (
    DeliveryFailed,
    EngineFailed,
    NoDecodeWorker,
    NotFinite,
    UnknownReservation,
    WinnowError,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = replace(
    REQUEST, num_sequences=2, sampling=replace(REQUEST.sampling, max_tokens=500, temperature=0.8)
)


@pytest_asyncio.fixture(loop_scope="module")
async def several(model_path: Path, redis_url: str) -> AsyncIterator[TestService]:
    async with running_service(model_path, redis_url, num_workers=3) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module")
async def parts(several: TestService) -> AsyncIterator[Service]:
    async with parts_of(several) as parts:
        yield parts


async def kill_worker_of(service: TestService, run: PromptRun) -> None:
    """Its connections break, and the registry forgets it."""
    assert run._generation is not None
    (worker,) = (w for w in service.workers if w.worker_id == run._generation.worker_id)
    await worker.stop()
    service.workers.remove(worker)


async def answers(
    service: TestService, run: PromptRun, kill_after: int | None = None
) -> list[list[int]]:
    """Each sequence's token ids; the worker is killed after that many steps."""
    token_ids: list[list[int]] = [[] for _ in range(run.request.num_sequences)]
    num_steps = 0
    async with run:
        await run.admit()
        async with aclosing(run.tokens()) as steps:
            async for tokens in steps:
                num_steps += 1
                for token in tokens:
                    token_ids[token.sequence_idx].append(token.token_id)
                if num_steps == kill_after:
                    await kill_worker_of(service, run)
                if len(run._ended) == run.request.num_sequences:
                    break
        await run.finish()
    return token_ids


async def test_the_answer_is_what_it_would_have_been(several: TestService, parts: Service) -> None:
    expected = await answers(several, make_run(parts, LONG))
    run = make_run(parts, LONG)
    assert await answers(several, run, kill_after=20) == expected
    assert run.state is State.FINISHED
    assert (run.figures.migrations, run.figures.attempts) == (1, 2)
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


async def test_a_client_sees_one_stream(model_path: Path, redis_url: str) -> None:
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
                extra_body={"ignore_eos": True},
            )
            async for chunk in chunks:
                text += chunk.choices[0].text
                found = chunk.choices[0].logprobs
                logprobs += found.token_logprobs or [] if found else []
                if kill and len(logprobs) > 10:
                    kill = False
                    (busy,) = (w for w in service.workers if w.engine.stats().running_sequences)
                    await busy.stop()
                    service.workers.remove(busy)
            return text, logprobs

        expected = await stream(kill=False)
        assert await stream(kill=True) == expected
        metrics = (await service.http.get("/metrics")).text
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
        await run._move(error)
    run.figures.migrations = lifecycle.MAX_MIGRATIONS
    with pytest.raises(EngineFailed, match="broke again"):
        await run._move(EngineFailed("broke again"))


async def test_without_another_worker_the_loss_is_told(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "_PATIENCE_S", 0.5)
    async with running_service(model_path, redis_url) as service, parts_of(service) as alone:
        with pytest.raises(NoDecodeWorker):
            await answers(service, make_run(alone, LONG), kill_after=5)
        peers = alone.router._peers.values()
        assert {(peer.num_places, peer.pages_held) for peer in peers} <= {(0, 0)}
