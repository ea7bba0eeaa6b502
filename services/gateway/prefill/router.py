"""Ray Serve's request router for prefill: to the replica that holds a prompt's beginning.

Every handle has a router of its own. It sees the calls of its own process; of the others it knows
what the replicas report once a second.
"""

import asyncio
import random

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from services.common.jobs import PrefillJob
from services.gateway.prefill.order import best_first
from services.gateway.prefill.replica import Blocks, Replica

# A thread hashes longer prompts: the event loop would stand still for over a millisecond.
_MAX_INLINE_TOKENS = 10_000


class PrefillRouter(RequestRouter):
    """Named in the deployment's options, for each handle's process to import.

    Serve finds a call by an ID that all calls made on behalf of one request share, and of several
    at once it would forget all but one: each must be made in a context of its own.
    """

    def initialize_state(self, **_: object) -> None:
        self._known: dict[ReplicaID, Replica] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called with all replicas when one of them comes, goes or reports."""
        super().update_replicas(replicas)
        known = self._known
        self._known = {one.replica_id: known.get(one.replica_id, Replica()) for one in replicas}
        for one in replicas:
            self._known[one.replica_id].update(one.routing_stats)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas, best first, each alone: Serve takes the first that answers."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # before it asks again
        job = None if pending_request is None else _job(pending_request)
        if pending_request is None or job is None or len(candidate_replicas) == 1:
            return [[one] for one in random.sample(candidate_replicas, len(candidate_replicas))]
        blocks = await self._hash(job)
        candidates = [one for one in candidate_replicas if one.replica_id in self._known]
        loads = [self._known[one.replica_id].load(blocks) for one in candidates]
        ordered = [candidates[idx] for idx in best_first(len(job.token_ids), loads)]
        if ordered:  # unless all were replaced meanwhile
            self._expect(ordered[0].replica_id, pending_request, job, blocks)
        return [[one] for one in ordered]

    async def _hash(self, job: PrefillJob) -> Blocks:
        """The prompt's blocks; in more than one way while another model is rolled out."""
        found = {replica.addressing for replica in self._known.values()}
        ways = [one for one in found if one is not None]
        if len(job.token_ids) <= _MAX_INLINE_TOKENS:
            return {one: one.blocks(job) for one in ways}
        return {one: await asyncio.to_thread(one.blocks, job) for one in ways}

    def _expect(
        self, replica_id: ReplicaID, request: PendingRequest, job: PrefillJob, blocks: Blocks
    ) -> None:
        """Count the prompt now, so that the next one to be routed sees it."""
        call_id = request.metadata.internal_request_id
        self._forget(call_id)  # if this is not the first try
        self._known[replica_id].send(call_id, job, blocks)
        request.future.add_done_callback(
            lambda future: self._forget(call_id) if future.cancelled() else None
        )

    def _forget(self, call_id: str) -> None:
        for replica in self._known.values():
            replica.forget(call_id)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        """Called when a replica has accepted the call."""
        for replica in self._known.values():  # it may be another than the first choice
            replica.accept(pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called once for each call that was sent, however it ended."""
        for replica in self._known.values():
            replica.end(internal_request_id)


def _job(request: PendingRequest) -> PrefillJob | None:
    """The prompt, if the call has one."""
    job = request.args[0] if request.args else None
    return job if isinstance(job, PrefillJob) else None
