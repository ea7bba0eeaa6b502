"""A prefill worker that only remembers, and a gateway that only passes prompts on."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from services.common.jobs import PrefillJob
from services.common.routing_stats import RoutingStats, short_hash
from services.gateway.prefill.handle import HandlePrefiller
from winnow.engine.prefix.hashes import block_hashes, prefix_salt

BLOCK_TOKENS = 16
FINGERPRINT = "model"


@dataclass(frozen=True, slots=True)
class Served:
    """Who computed a prompt, and how many of its tokens it did not compute."""

    pid: int
    held_tokens: int


@serve.deployment
class RememberingPrefill:
    """Takes `token_s` for each token that it has not seen at the same place of a prompt."""

    def __init__(self, token_s: float) -> None:
        self._token_s = token_s
        self._held: dict[bytes, None] = {}
        self._work: dict[str, int] = {}

    async def prefill(self, job: PrefillJob) -> Served:
        hashes = block_hashes(job.token_ids, prefix_salt(FINGERPRINT, job.cache_salt), BLOCK_TOKENS)
        held_tokens = BLOCK_TOKENS * sum(block in self._held for block in hashes)
        self._work[job.request_id] = len(job.token_ids) - held_tokens
        try:
            await asyncio.sleep(self._token_s * self._work[job.request_id])
        finally:
            del self._work[job.request_id]
        self._held.update(dict.fromkeys(hashes))
        return Served(os.getpid(), held_tokens)

    async def ready(self) -> bool:
        return True

    async def record_routing_stats(self) -> dict[str, Any]:
        blocks = list(map(short_hash, self._held))
        return RoutingStats(FINGERPRINT, BLOCK_TOKENS, blocks, self._work).to_dict()


@serve.deployment
class PassingGateway:
    """by_reference: of the handle; False as with RAY_SERVE_USE_GRPC_BY_DEFAULT=1."""

    def __init__(self, prefill: DeploymentHandle[Any], _: DeploymentHandle[Any] | None) -> None:
        """The second is another gateway, bound to the same application."""
        self._prefillers = {
            by_reference: HandlePrefiller(prefill.options(_by_reference=by_reference))
            for by_reference in (True, False)
        }

    async def prefill(
        self, rounds: Sequence[Sequence[PrefillJob]], by_reference: bool
    ) -> list[list[Any]]:
        """What became of each prompt, or its error; those of a round come at once."""
        prefiller = self._prefillers[by_reference]
        return [
            await asyncio.gather(*map(prefiller.prefill, jobs), return_exceptions=True)
            for jobs in rounds
        ]

    async def ready(self) -> bool:
        return await self._prefillers[True].ready()
