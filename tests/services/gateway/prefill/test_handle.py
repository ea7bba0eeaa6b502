"""What Ray's handles raise, as the gateway tells it; Ray's own part is played here."""

import asyncio
from collections.abc import Generator
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve.exceptions import RequestCancelledError
from ray.serve.handle import DeploymentHandle

from services.common.jobs import PrefillJob
from services.gateway.prefill.handle import HandlePrefiller
from winnow.errors import PrefillFailed, PrefillLost, StaleAttempt
from winnow.pruning_settings import PruningSettings
from winnow.wire import Ticket

pytestmark = pytest.mark.asyncio(loop_scope="module")

JOB = PrefillJob("r", 1, (1, 2), PruningSettings(), "127.0.0.1:1", Ticket(4, b""), 20.0)


class Response:
    """Of a call that fails, or that never ends."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, object]:
        if self.error is not None:
            raise self.error
        return (yield from asyncio.Event().wait().__await__())

    def cancel(self) -> None:
        self.cancelled = True


class FailingHandle:
    """A handle whose every method gives that response."""

    def __init__(self, error: BaseException | None) -> None:
        self.response = Response(error)

    def __getattr__(self, method: str) -> "FailingHandle":
        return self

    def remote(self, *_: object) -> Response:
        return self.response


def prefiller(handle: FailingHandle) -> HandlePrefiller:
    return HandlePrefiller(cast(DeploymentHandle[Any], handle))


def rpc_error(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "details")


LOST = [
    ActorUnavailableError("unavailable", b"1" * 16),
    RequestCancelledError("r"),
    rpc_error(grpc.StatusCode.INTERNAL),
    rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED),
    asyncio.CancelledError(),
]


@pytest.mark.parametrize("error", LOST, ids=repr)
async def test_whatever_befalls_the_worker_or_the_way_to_it_is_a_lost_one(
    error: BaseException,
) -> None:
    with pytest.raises(PrefillLost):
        await prefiller(FailingHandle(error)).prefill(JOB)
    assert not await prefiller(FailingHandle(error)).ready()


async def test_the_workers_own_error_keeps_its_class() -> None:
    stale = StaleAttempt("attempt 2 was seen")
    for error in (stale, RayTaskError("prefill", "traceback", stale)):
        with pytest.raises(StaleAttempt):
            await prefiller(FailingHandle(error)).prefill(JOB)
    broken = RayTaskError("prefill", "traceback", ValueError("broke"))
    for other in (broken, ValueError("broke")):
        with pytest.raises(PrefillFailed, match="broke"):
            await prefiller(FailingHandle(other)).prefill(JOB)


async def test_who_is_cancelled_cancels_the_job() -> None:
    handle = FailingHandle(None)
    task = asyncio.create_task(prefiller(handle).prefill(JOB))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.response.cancelled
