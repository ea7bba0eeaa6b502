"""Prefill behind a deployment handle of Ray Serve."""

import asyncio
import contextvars
from typing import Any

import grpc
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from services.common.jobs import PrefillJob, PrefillOutcome
from services.common.tasks import is_cancelled
from winnow.errors import DeadlineExceeded, PrefillFailed, PrefillLost, WinnowError

# Ray's own errors, and gRPC's under RAY_SERVE_USE_GRPC_BY_DEFAULT=1.
_TRANSPORT_ERRORS = (RayError, RayServeException, grpc.RpcError)
_READY_TIMEOUT_S = 2.0


class HandlePrefiller:
    """Calls prefill through its deployment handle, and maps Ray's errors to WinnowError.

    Each call is made in a context of its own, as PrefillRouter needs it.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def prefill(self, job: PrefillJob) -> PrefillOutcome:
        response = contextvars.Context().run(self._handle.prefill.remote, job)
        try:
            async with asyncio.timeout(job.deadline_s):
                return await response  # type: ignore[no-any-return]
        except asyncio.CancelledError as error:
            if not is_cancelled():  # the replica was cancelled, and Ray passes its exception on
                raise PrefillLost("the prefill worker gave the job up") from error
            response.cancel()  # type: ignore[no-untyped-call]
            raise
        except TimeoutError as error:
            response.cancel()  # type: ignore[no-untyped-call]
            raise DeadlineExceeded(f"prefill did not end within {job.deadline_s:.3g} s") from error
        except RayTaskError as error:
            if isinstance(error.cause, WinnowError):
                raise error.cause from None
            raise PrefillFailed(f"the prefill worker broke: {error.cause!r}") from error
        except _TRANSPORT_ERRORS as error:
            raise PrefillLost(f"the prefill worker was lost: {error!r}") from error
        except WinnowError:
            raise
        except Exception as error:  # an error of the worker, without RayTaskError over gRPC
            raise PrefillFailed(f"the prefill worker broke: {error!r}") from error

    async def ready(self) -> bool:
        response = contextvars.Context().run(self._handle.ready.remote)
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                return bool(await response)
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            return False
        except (TimeoutError, *_TRANSPORT_ERRORS):
            response.cancel()  # type: ignore[no-untyped-call]
            return False
