"""A prompt's life when something goes wrong on its way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
import pytest_asyncio
from grpc.aio import ServicerContext

from services.common.redis_registry import RedisRegistry
from services.decode import generate
from services.decode.generate import GenerateServicer
from services.gateway.request import generation_run
from services.gateway.request.routing import Router
from services.gateway.request.run import Service
from services.gateway.request.states import State
from tests.deadlines import SOON_S
from tests.services.gateway.request.prompt_runs import (
    LARGE,
    REQUEST,
    complete,
    failure,
    make_run,
    parts_of,
    small_and_large,
)
from tests.services.gateway.service import TestService, running_service
from winnow.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidSetting,
    LeaseExpired,
    NoDecodeWorker,
    Overloaded,
    PrefillFailed,
    PrefillLost,
    TransferDamaged,
    WinnowError,
)
from winnow.v1 import decode_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def parts(service: TestService) -> AsyncIterator[Service]:
    async with parts_of(service) as parts:
        yield parts
    service.prefiller.failures.clear()
    service.prefiller.hold.set()
    await service.until_idle()


async def test_goes_from_received_to_finished(parts: Service) -> None:
    run = make_run(parts)
    assert run.state is State.RECEIVED
    assert len(await complete(run)) == 4
    assert run.state is State.FINISHED
    assert run.stats.attempts == 1
    assert run.stats.report is not None and run.stats.report.num_prompt_tokens == 40
    assert run.stats.timings is not None and run.stats.timings.wire_bytes > 0


async def test_shows_each_state_on_the_way(service: TestService, parts: Service) -> None:
    service.prefiller.hold_jobs()
    async with make_run(parts) as run:
        await run.admit()
        assert run.state is State.ADMITTED
        async with aclosing(run.tokens()) as steps:
            first = asyncio.create_task(anext(steps))
            await service.prefiller.asked.wait()
            assert run.state is State.PREFILLING
            service.prefiller.hold.set()
            await first
            assert run.state is State.DECODING
    assert run.state is State.CANCELLED


@pytest.mark.parametrize("error", [PrefillFailed("lost"), TransferDamaged("bad checksum")])
async def test_a_failed_prefill_is_tried_again_under_the_next_attempt(
    service: TestService, parts: Service, error: WinnowError
) -> None:
    expected = await complete(make_run(parts))
    service.prefiller.failures = [error]
    run = make_run(parts)
    assert await complete(run) == expected
    assert [job.attempt for job in service.prefiller.jobs[-2:]] == [1, 2]
    assert run.stats.attempts == 2


async def test_the_last_attempts_failure_ends_the_prompt(
    service: TestService, parts: Service
) -> None:
    service.prefiller.failures = [PrefillFailed("first"), PrefillFailed("second")]
    assert str(await failure(make_run(parts))) == "second"


async def test_a_lost_prefill_worker_costs_no_try(service: TestService, parts: Service) -> None:
    expected = await complete(make_run(parts))
    service.prefiller.failures = [PrefillLost("lost")] * 4 + [PrefillFailed("one of two tries")]
    run = make_run(parts)
    assert await complete(run) == expected
    assert run.stats.attempts == 6


async def test_prefill_that_stays_lost_ends_the_prompt(
    service: TestService, parts: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.request.run._PREFILL_PATIENCE_S", 0.5)
    error = PrefillLost("lost")
    service.prefiller.failures = [error] * 10
    assert await failure(make_run(parts)) is error
    assert len(service.prefiller.failures) > 0
    service.prefiller.failures.clear()


async def test_a_failure_that_another_attempt_would_meet_too_is_final(
    service: TestService, parts: Service
) -> None:
    error = Overloaded("queue is full")
    service.prefiller.failures = [error]
    num_jobs = len(service.prefiller.jobs)
    assert await failure(make_run(parts)) is error
    assert len(service.prefiller.jobs) == num_jobs + 1


async def test_a_worker_lost_after_the_last_token_takes_nothing_from_the_answer(
    parts: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await complete(make_run(parts))
    monkeypatch.setattr(generation_run, "_LAST_WORDS_TIMEOUT_S", 0.2)
    stream_tokens = generate._stream_tokens

    async def breaks(*arguments: Any) -> None:
        await stream_tokens(*arguments)
        raise EngineFailed("lost")

    async def hangs(*arguments: Any) -> None:
        await stream_tokens(*arguments)
        await asyncio.Event().wait()

    for end in (breaks, hangs):
        monkeypatch.setattr(generate, "_stream_tokens", end)
        run = make_run(parts)
        async with asyncio.timeout(SOON_S):
            assert await complete(run) == expected
        assert run.state is State.FINISHED


async def test_leaving_early_frees_decode_and_cancels_prefill(
    service: TestService, parts: Service
) -> None:
    service.prefiller.hold_jobs()
    async with make_run(parts) as run:
        await run.admit()
        async with aclosing(run.tokens()) as steps:
            waiting = asyncio.create_task(anext(steps))
            await service.prefiller.asked.wait()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
    assert run.state is State.CANCELLED
    async with asyncio.timeout(SOON_S):
        await service.prefiller.cancelled.wait()
    await service.until_idle()


async def test_a_prompt_that_can_never_fit_is_an_invalid_setting(parts: Service) -> None:
    request = replace(REQUEST, num_sequences=65)
    error = await failure(make_run(parts, request))
    assert isinstance(error, InvalidSetting)
    assert "65" in str(error)


async def test_a_deadline_that_has_passed_costs_nothing(parts: Service) -> None:
    assert isinstance(await failure(make_run(parts, timeout_s=-1)), DeadlineExceeded)


async def test_without_any_worker_there_is_no_decode_worker(
    redis_url: str, service: TestService
) -> None:
    registry = RedisRegistry(redis_url, "nobody")
    router = Router(registry, "f")
    error = await failure(
        make_run(
            Service(
                router,
                service.prefiller,
                service.gateway.model.description,
                1,
                service.gateway.metrics,
            )
        )
    )
    assert isinstance(error, NoDecodeWorker)
    assert "no decode worker for this model is registered" in str(error)
    await registry.close()


async def test_a_worker_that_is_gone_is_passed_over(redis_url: str, service: TestService) -> None:
    """Its record is still there, and it looks like the one with most memory."""
    record = (await service.registry.workers())[0]
    dead = replace(record, worker_id="dead", address="127.0.0.1:1", pages_free=10**9)
    registry = RedisRegistry(redis_url, "with-dead")
    for one in (record, dead):
        await registry.put(one, 30)
    router = Router(registry, record.fingerprint)
    assert (await router.candidates())[0].worker_id == "dead"
    parts = Service(
        router, service.prefiller, service.gateway.model.description, 1, service.gateway.metrics
    )
    assert len(await complete(make_run(parts))) == 4
    assert (await router.candidates())[-1].worker_id == "dead"
    await router.close()
    await registry.close()


class Leaving(GenerateServicer):
    """Of the workers, the one that is asked first breaks the call off without a word."""

    left: ClassVar[list[str]] = []

    async def Generate(self, request: pb.GenerateRequest, context: ServicerContext) -> None:
        if not self.left:
            self.left.append(self._identity.worker_id)
            await context.abort(self.code, "Cancelling all calls")
        await super().Generate(request, context)

    code: ClassVar[grpc.StatusCode]


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL])
async def test_a_worker_that_ends_at_admission_is_passed_over(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode
) -> None:
    monkeypatch.setattr("services.decode.worker.GenerateServicer", Leaving)
    monkeypatch.setattr(Leaving, "left", [])
    monkeypatch.setattr(Leaving, "code", code, raising=False)
    async with running_service(model_path, redis_url, num_workers=2) as service:
        async with parts_of(service) as parts:
            run = make_run(parts)
            assert len(await complete(run)) == 4
        assert Leaving.left != [] and run.stats.migrations == 0
        await service.until_idle()


async def test_a_full_worker_passes_a_prompt_on_and_all_full_is_overloaded(
    model_path: Path, redis_url: str
) -> None:
    memory = {"kv_memory_bytes": 1 << 20, "kv_overcommit": 1, "num_workers": 2}
    async with running_service(model_path, redis_url, **memory) as service:
        model = service.gateway.model.description
        router = Router(service.registry, model.fingerprint)
        parts = Service(router, service.prefiller, model, 1, service.gateway.metrics)
        large = replace(REQUEST, sampling=replace(REQUEST.sampling, max_tokens=600))
        runs = [make_run(parts, replace(large, request_id=f"p{i}")) for i in range(3)]
        async with runs[0], runs[1]:
            await runs[0].admit()
            await runs[1].admit()
            reserved = [w.engine.stats().reserved_requests for w in service.workers]
            assert reserved == [1, 1]
            error = await failure(runs[2])
            assert isinstance(error, Overloaded)
        await service.until_idle()
        await router.close()


async def test_what_is_too_large_for_one_worker_goes_to_a_larger_one(
    model_path: Path, redis_url: str
) -> None:
    async with small_and_large(model_path, redis_url) as (_, parts, large):
        (record,) = (
            worker
            for worker in await parts.router.candidates()
            if worker.worker_id == large.worker_id
        )
        place = parts.router.enter(record)
        place.suspect()  # so that the small one is asked first
        place.leave()
        assert len(await complete(make_run(parts, LARGE))) == 1000
        async with make_run(parts, replace(LARGE, request_id="first")) as first:
            await first.admit()
            assert isinstance(await failure(make_run(parts, LARGE)), Overloaded)
        error = await failure(make_run(parts, replace(LARGE, num_sequences=4)))
        assert isinstance(error, InvalidSetting)


async def test_kv_that_never_comes_is_a_lease_expired(model_path: Path, redis_url: str) -> None:
    async with running_service(model_path, redis_url, kv_lease_s=0.3) as service:
        model = service.gateway.model.description
        router = Router(service.registry, model.fingerprint)
        service.prefiller.hold_jobs()
        error = await failure(
            make_run(Service(router, service.prefiller, model, 1, service.gateway.metrics))
        )
        assert isinstance(error, LeaseExpired)
        await router.close()


async def test_a_reader_may_pause_for_longer_than_a_worker_may_be_silent(parts: Service) -> None:
    strict = replace(parts, silence_s=0.5)
    sampling = replace(REQUEST.sampling, max_tokens=40)
    run = make_run(strict, replace(REQUEST, sampling=sampling))
    num_tokens = 0
    async with run:
        await run.admit()
        async with aclosing(run.tokens()) as steps:
            async for tokens in steps:
                num_tokens += len(tokens)
                if num_tokens in (1, 20):
                    await asyncio.sleep(1)
                if num_tokens == sampling.max_tokens:
                    break
        await run.finish()
    assert run.stats.migrations == 0
