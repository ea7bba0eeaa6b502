"""Decode workers with this release's sampler beside those that know of no versions."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from grpc.aio import ServicerContext

from services.common.registry import WorkerRecord
from services.common.tracing import Span
from services.decode.active_request import ActiveRequest
from services.decode.generate import GenerateServicer
from services.decode.worker import DecodeWorker
from services.gateway.request.generate_call import PromptRequest
from services.gateway.request.generation_run import PromptRun
from services.gateway.request.run import Service
from tests.deadlines import SOON_S
from tests.services.gateway.request.prompt_runs import (
    REQUEST,
    answers,
    kill_worker_of,
    make_run,
    parts_of,
    worker_of,
)
from tests.services.gateway.service import TestService, running_service
from winnow.engine.outputs import StepOutput
from winnow.sampler_version import SAMPLER_VERSION
from winnow.v1 import decode_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREEDY = replace(
    REQUEST, num_sequences=2, sampling=replace(REQUEST.sampling, max_tokens=500, temperature=0)
)
SAMPLED = replace(GREEDY, sampling=replace(GREEDY.sampling, temperature=0.8))
NEW_SAMPLER = "sampler version 2 goes on where 1 began"


class OldServicer(GenerateServicer):
    """Generate of a worker that does not know of versions."""

    async def _generate(
        self, message: pb.GenerateRequest, context: ServicerContext, own: Span
    ) -> None:
        message.sampler_version = SAMPLER_VERSION
        await super()._generate(message, context, own)

    def _admitted(self, request: ActiveRequest) -> pb.Admitted:
        admitted = super()._admitted(request)
        admitted.ClearField("sampler_version")
        return admitted


class OldWorker(DecodeWorker):
    """Its record tells no version, and less room than others have."""

    def _record(self) -> WorkerRecord:
        return replace(super()._record(), sampler_version=1, pages_free=1)


@asynccontextmanager
async def old_workers(
    model_path: Path, redis_url: str, number: int
) -> AsyncIterator[tuple[TestService, Service]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.decode.worker.GenerateServicer", OldServicer)
        patch.setattr("tests.services.gateway.service.DecodeWorker", OldWorker)
        async with running_service(model_path, redis_url, num_workers=number) as service:
            patch.undo()
            async with parts_of(service) as parts:
                yield service, parts
                await service.until_idle()


def hold_from(worker: DecodeWorker, num_steps: int, go_on: threading.Event) -> None:
    """So that a request outlasts the start of another worker: it waits after so many steps.

    Then it takes its time, in which the request can still move.
    """
    step, numbers = worker.engine.step, itertools.count()

    def held_step() -> list[StepOutput]:
        if next(numbers) >= num_steps:
            assert go_on.wait(SOON_S)
        time.sleep(0.003)
        return step()

    worker.engine.step = held_step  # type: ignore[method-assign]


async def until_known(parts: Service, worker: DecodeWorker) -> None:
    """Wait until the router may choose the worker."""
    async with asyncio.timeout(SOON_S):
        while not await is_known(parts, worker):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.05)


async def is_known(parts: Service, worker: DecodeWorker) -> bool:
    return worker.worker_id in {one.worker_id for one in await parts.router.candidates()}


Harm = Callable[[TestService, PromptRun], Awaitable[None]]


async def harmed(
    service: TestService, parts: Service, request: PromptRequest, harm: Harm
) -> PromptRun:
    """A run whose worker is harmed once a worker of this release has joined; then it goes."""
    new, joined = DecodeWorker(service.workers[0]._settings), threading.Event()
    for old in service.workers:
        hold_from(old, 20, joined)

    async def join_and_harm(service: TestService, run: PromptRun) -> None:
        await new.start()
        service.workers.append(new)
        await until_known(parts, new)
        joined.set()
        await harm(service, run)

    run = make_run(parts, request)
    try:
        found = await answers(service, run, harm_after=5, harm=join_and_harm)
        assert [len(one) for one in found] == [request.sampling.max_tokens] * request.num_sequences
    finally:
        joined.set()
        await new.stop()
        if new in service.workers:
            service.workers.remove(new)
    return run


async def drain(service: TestService, run: PromptRun) -> None:
    draining.append(asyncio.create_task(worker_of(service, run).drain(60)))


draining: list[asyncio.Task[int]] = []


@pytest.mark.parametrize(("request_", "moves"), [(GREEDY, 1), (SAMPLED, 0)])
async def test_only_greedy_requests_move_to_another_sampler(
    model_path: Path, redis_url: str, request_: PromptRequest, moves: int
) -> None:
    """What is sampled ends where it is."""
    async with old_workers(model_path, redis_url, 1) as (service, parts):
        run = await harmed(service, parts, request_, drain)
        assert await draining.pop() == 0
    assert (run.stats.moves, run.stats.migrations) == (moves, 0)


async def test_a_sampled_request_moves_to_a_worker_with_its_sampler(
    model_path: Path, redis_url: str
) -> None:
    async with old_workers(model_path, redis_url, 2) as (service, parts):
        expected = await answers(service, make_run(parts, SAMPLED))
        run = await harmed(service, parts, SAMPLED, drain)
        assert await draining.pop() == 0
    assert (run.stats.moves, run.stats.migrations) == (1, 0)
    assert [run.answer(0), run.answer(1)] == expected


@pytest.mark.parametrize(("request_", "is_told"), [(GREEDY, False), (SAMPLED, True)])
async def test_a_lost_request_goes_on_with_another_sampler_if_there_is_no_other(
    model_path: Path,
    redis_url: str,
    request_: PromptRequest,
    is_told: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with old_workers(model_path, redis_url, 1) as (service, parts):
        run = await harmed(service, parts, request_, kill_worker_of)
    assert run.stats.migrations == 1
    assert (NEW_SAMPLER in caplog.text) == is_told


async def test_a_lost_request_prefers_a_worker_with_its_sampler(
    model_path: Path, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with old_workers(model_path, redis_url, 2) as (service, parts):
        run = await harmed(service, parts, SAMPLED, kill_worker_of)
        assert run._calls.current.sampler_version == 1
    assert run.stats.migrations == 1
    assert NEW_SAMPLER not in caplog.text
