"""Prompts run through the parts of a service, without REST or gRPC before them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from services.decode.worker import DecodeWorker
from services.gateway.request.generate_call import PromptRequest
from services.gateway.request.generation_run import PromptRun
from services.gateway.request.routing import Router
from services.gateway.request.run import Service
from services.gateway.request.states import State
from tests.deadlines import SOON_S
from tests.services.gateway.service import TestService, running_service
from tests.winnow.drive import UNPRUNED
from winnow.errors import WinnowError
from winnow.sampling_params import SamplingParams

REQUEST = PromptRequest(
    request_id="p",
    token_ids=tuple(range(5, 45)),
    num_sequences=1,
    sampling=SamplingParams(max_tokens=4, temperature=0, ignore_eos=True),
    pruning=UNPRUNED,
)
LARGE = replace(REQUEST, sampling=replace(REQUEST.sampling, max_tokens=1000))


@asynccontextmanager
async def parts_of(service: TestService) -> AsyncIterator[Service]:
    """What a prompt's life needs, with a router of its own."""
    model = service.gateway.model.description
    router = Router(service.registry, model.fingerprint)
    yield Service(router, service.prefiller, model, 2, service.gateway.metrics)
    await router.close()


def make_run(
    parts: Service, request: PromptRequest = REQUEST, timeout_s: float = SOON_S
) -> PromptRun:
    return PromptRun(request, parts, asyncio.get_running_loop().time() + timeout_s)


async def complete(run: PromptRun) -> list[int]:
    """Runs a prompt to its end; its token ids."""
    token_ids: list[int] = []
    async with run:
        await run.admit()
        async with aclosing(run.tokens()) as steps:
            async for tokens in steps:
                token_ids += [token.token_id for token in tokens]
                if len(token_ids) == run.request.sampling.max_tokens:
                    break
        await run.finish()
    return token_ids


async def failure(run: PromptRun) -> WinnowError:
    with pytest.raises(WinnowError) as error:
        await complete(run)
    assert run.state is State.FAILED
    return error.value


@asynccontextmanager
async def small_and_large(
    model_path: Path, redis_url: str
) -> AsyncIterator[tuple[TestService, Service, DecodeWorker]]:
    """A service whose decode worker is small, with a larger one beside it; the parts; that one."""
    memory = {"kv_memory_bytes": 1 << 20, "kv_overcommit": 1}
    async with running_service(model_path, redis_url, **memory) as service:
        larger = {"kv_memory_bytes": 2 << 20}
        large = DecodeWorker(service.settings.model_copy(update=larger))
        await large.start()
        try:
            async with parts_of(service) as parts:
                yield service, parts, large
            await service.until_idle()
        finally:
            await large.stop()


def worker_of(service: TestService, run: PromptRun) -> DecodeWorker:
    (worker,) = (w for w in service.workers if w.worker_id == run._calls.current.worker_id)
    return worker


async def break_off(worker: DecodeWorker) -> None:
    """Its connections break, and the registry forgets it."""
    await worker._control._server.stop(None)  # at once; `stop` would let a short answer end
    await worker.stop()


async def kill_worker_of(service: TestService, run: PromptRun) -> None:
    worker = worker_of(service, run)
    await break_off(worker)
    service.workers.remove(worker)


async def answers(
    service: TestService,
    run: PromptRun,
    harm_after: int | None = None,
    harm: Callable[[TestService, PromptRun], Awaitable[None]] = kill_worker_of,
) -> list[list[int]]:
    """Each sequence's token ids; the worker is harmed after that many steps."""
    token_ids: list[list[int]] = [[] for _ in range(run.request.num_sequences)]
    num_steps = 0
    async with run:
        await run.admit()
        async with aclosing(run.tokens()) as steps:
            async for tokens in steps:
                num_steps += 1
                for token in tokens:
                    token_ids[token.sequence_idx].append(token.token_id)
                if num_steps == harm_after:
                    await harm(service, run)
                if len(run._ended) == run.request.num_sequences:
                    break
        await run.finish()
    return token_ids
