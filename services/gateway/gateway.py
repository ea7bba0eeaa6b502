"""The gateway independent of protocols: the part that REST and gRPC share."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from services.common.registry import MetricsTarget, Registry
from services.common.settings import Settings
from services.common.tls import PeerTls
from services.common.tracing import context_of, span
from services.gateway.access.access import Access
from services.gateway.access.keys import ApiKey
from services.gateway.access.request_limits import RequestLimits
from services.gateway.metrics import GatewayMetrics
from services.gateway.quality.checks import QualityChecks
from services.gateway.reads import GrammarReads
from services.gateway.request.load_adapter import load_on_workers
from services.gateway.request.outcomes import Outcomes
from services.gateway.request.prefiller import Prefiller
from services.gateway.request.request import GenerationRequest
from services.gateway.request.routing import Router
from services.gateway.request.run import Run, Service
from services.gateway.request.running_request import RunningRequest, prompt_runs
from services.gateway.served_adapters import ServedAdapters
from services.gateway.served_model import ServedModel
from winnow.adapters.description import AdapterDescription
from winnow.errors import DeadlineExceeded, InvalidGrammar, RegistryUnavailable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a request could be served now, and why not."""

    decode_workers: int
    prefill: bool
    ending: bool

    @property
    def ready(self) -> bool:
        return self.decode_workers > 0 and self.prefill and not self.ending

    @property
    def status(self) -> str:
        return "ready" if self.ready else "not ready"


class Gateway:
    """Routes requests to decode and prefill; holds a tokenizer but no weights.

    ending: shutdown is near; requests are still served, but readiness is false.

    Create it on its event loop.  Raises UnusableModel or InvalidSetting.
    """

    def __init__(self, settings: Settings, registry: Registry, prefiller: Prefiller) -> None:
        self.settings = settings
        self.ending = False
        self.model = ServedModel.load(settings)
        description = self.model.description
        self.adapters = ServedAdapters(settings, description, registry)
        self.limits = RequestLimits(settings, self.model, self.adapters)
        self.metrics = GatewayMetrics(
            settings.served_name, settings.quality_tasks, settings.adapters
        )
        self.access = Access(settings)
        self.grammars = self.model.new_grammar_compiler()
        self.reads = GrammarReads()
        try:
            self.grammars.prepare()
        except InvalidGrammar as error:
            logger.warning("structured output is refused: it %s", error)
        self._registry = registry
        # Live workers return to an emptied registry with their next heartbeat.
        self._router = Router(
            registry, description.fingerprint, PeerTls.load(settings), refill_s=settings.lease_s
        )
        self._prefiller = prefiller
        self._service = Service(
            self._router,
            prefiller,
            description,
            settings.prefill_attempts,
            self.metrics,
            silence_s=settings.lease_s,
        )
        self._checks = QualityChecks(settings, prefiller, self.model, self.metrics)

    @asynccontextmanager
    async def open(
        self, request: GenerationRequest, key: ApiKey | None = None, trace_context: str = ""
    ) -> AsyncIterator[RunningRequest]:
        """Context manager: reserve KV memory for all prompts; free everything on exit.

        key: charged for the tokens; a request that is not admitted is not charged.
        trace_context: the client's traceparent, or empty.

        Raises RateLimited, Overloaded or NoDecodeWorker if not all prompts can be admitted,
        DeadlineExceeded if the block exceeds the request timeout.
        """
        await self.access.require_tokens(key, request.most_tokens)
        with self._checks.giving_way():
            cache_salt = self.access.cache_salt(key, request.cache_salt)
            sampled = self._checks.sampled(request)
            async with self._run(sampled, trace_context, cache_salt) as running:
                await self.access.charge_tokens(key, request.most_tokens)
                yield running
            self._checks.add(running)

    @asynccontextmanager
    async def _run(
        self, request: GenerationRequest, trace_context: str, cache_salt: str
    ) -> AsyncIterator[RunningRequest]:
        timeout_s = self.settings.request_timeout_s
        with span(
            "completion",
            trace_context,
            is_server=True,
            request_id=request.request_id,
            model=self.model.name,
            prompts=len(request.prompts),
        ) as request_span:
            context = context_of(request_span)
            runs = prompt_runs(request, self._service, timeout_s, context, cache_salt)
            running = RunningRequest(request, runs, self.model, self.metrics)
            async with self._admitted(running, timeout_s):
                yield running

    @asynccontextmanager
    async def _admitted(self, running: RunningRequest, timeout_s: float) -> AsyncIterator[None]:
        runs = running.runs
        with Outcomes(running, self.metrics):
            async with AsyncExitStack() as admitted:
                for run in runs:
                    await admitted.enter_async_context(run)
                async with _deadline(timeout_s):
                    await _admit_all(runs)
                    yield

    async def load_adapter(self, name: str, folder: str) -> AdapterDescription:
        """Serve an adapter from now on, once all decode workers have read it.

        Prefill workers read it when the first prompt comes.
        Raises InvalidSetting, UnusableAdapter, NoDecodeWorker or RegistryUnavailable.
        """
        found = await self.adapters.describe(name, folder)
        await load_on_workers(self._router, found.ref, self.model.description)
        await self.adapters.add(found)
        return found

    async def readiness(self) -> Readiness:
        """Query the registry and prefill now."""
        try:
            workers = await self._router.candidates()
        except RegistryUnavailable as error:
            logger.warning("%s", error)
            workers = []
        self.metrics.decode_workers.set(len(workers))
        self.metrics.incompatible_workers.set(self._router.num_incompatible)
        return Readiness(len(workers), await self._prefiller.ready(), self.ending)

    async def targets(self) -> list[MetricsTarget]:
        """Metrics endpoints of all of the service's processes.  Raises RegistryUnavailable."""
        return await self._registry.targets()

    async def close(self) -> None:
        """Drop quality checks; close the connections to decode workers and to the rate limits."""
        self.reads.close()
        await self.adapters.close()
        await asyncio.to_thread(self.grammars.close)
        await self._checks.close()
        await self.access.close()
        await self._router.close()


@asynccontextmanager
async def _deadline(timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s) as timeout:
            yield
    except TimeoutError as error:
        if not timeout.expired():
            raise
        raise DeadlineExceeded(f"the request did not end within {timeout_s:g} seconds") from error


async def _admit_all(runs: Sequence[Run]) -> None:
    """Admit the runs concurrently; raises the first error after all have finished."""
    results = await asyncio.gather(*(run.admit() for run in runs), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
