"""What a router knows of one prefill replica: what it reports, and what was sent to it."""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.common.jobs import PrefillJob
from services.common.routing_stats import RoutingStats, short_hash
from services.gateway.prefill.order import Load
from winnow.adapters.ref import variant_fingerprint
from winnow.engine.prefix.hashes import block_hashes, prefix_salt
from winnow.methods import method_class

# When a prompt has ended, reports tell what is left of it; they may take this long to arrive.
_REPORT_LAG_S = 5.0
# So long may a replica take to accept a prompt; what was cancelled just before is never sent.
_ACCEPT_S = 5.0
# Sent blocks to remember: of prompts of 8 million tokens, at 128 a block.
_MAX_BLOCKS = 1 << 16


@dataclass(frozen=True, slots=True)
class Addressing:
    """How the replicas of one model address blocks."""

    fingerprint: str
    block_tokens: int

    def blocks(self, job: PrefillJob) -> Sequence[bytes]:
        """Short hashes of the prompt's whole blocks; none if it does not use the prefix store."""
        method = method_class(job.pruning.method)
        if method.no_prefix_reason() is not None or job.num_prompt_logprobs is not None:
            return ()
        fingerprint = variant_fingerprint(self.fingerprint, job.kv_variant)
        salt = prefix_salt(fingerprint, job.cache_salt)
        return [short_hash(one) for one in block_hashes(job.token_ids, salt, self.block_tokens)]


# Of one prompt.
Blocks = Mapping[Addressing, Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class _Sent:
    """A prompt.  to_compute: the tokens that the replica did not hold when it was sent."""

    request_id: str
    blocks: Sequence[bytes]
    to_compute: int


class Replica:
    """A prompt counts from when it is sent, and its blocks are held: reports come later.

    clock: seconds, as of time.monotonic().
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reported: Mapping[str, Any] = {}
        self._stats = RoutingStats("", 0, (), {})
        self._under_way: dict[str, _Sent] = {}
        self._unaccepted: dict[str, float] = {}  # those of them, by when they were sent
        self._ended: deque[tuple[float, _Sent]] = deque()
        self._sent_blocks: Counter[bytes] = Counter()  # the number of those prompts with each

    def update(self, reported: Mapping[str, Any]) -> None:
        """Take in the newest report, of RoutingStats.to_dict; empty before the first."""
        if reported and reported != self._reported:
            self._reported = reported
            self._stats = RoutingStats.from_dict(reported)

    @property
    def addressing(self) -> Addressing | None:
        """None before the first report."""
        if not self._reported:
            return None
        return Addressing(self._stats.fingerprint, self._stats.block_tokens)

    def load(self, blocks: Blocks) -> Load:
        """The replica as the prompt with these blocks finds it."""
        self._forget_old()
        return Load(self._held_tokens(self._own(blocks)), self._work())

    def send(self, call_id: str, job: PrefillJob, blocks: Blocks) -> None:
        """Count a prompt until `end` or `forget`, or for a while if it is never accepted."""
        own = self._own(blocks)
        to_compute = max(1, len(job.token_ids) - self._held_tokens(own))
        if len(self._sent_blocks) + len(own) > _MAX_BLOCKS:
            own = ()  # reports will tell of them
        self._under_way[call_id] = _Sent(job.request_id, own, to_compute)
        self._unaccepted[call_id] = self._clock()
        self._sent_blocks.update(own)

    def accept(self, call_id: str) -> None:
        """The replica has the prompt: its end will be told."""
        self._unaccepted.pop(call_id, None)

    def end(self, call_id: str) -> None:
        """The prompt has ended, one way or another."""
        sent = self._pop(call_id)
        if sent is not None:
            self._ended.append((self._clock(), sent))

    def forget(self, call_id: str) -> None:
        """The prompt was not sent after all."""
        sent = self._pop(call_id)
        if sent is not None:
            self._remove(sent)

    def _pop(self, call_id: str) -> _Sent | None:
        self._unaccepted.pop(call_id, None)
        return self._under_way.pop(call_id, None)

    def _own(self, blocks: Blocks) -> Sequence[bytes]:
        return () if self.addressing is None else blocks.get(self.addressing, ())

    def _held_tokens(self, blocks: Sequence[bytes]) -> int:
        """Up to the last block held: of a prompt the last ones are evicted first."""
        for idx in reversed(range(len(blocks))):
            if blocks[idx] in self._stats.blocks or blocks[idx] in self._sent_blocks:
                return (idx + 1) * self._stats.block_tokens
        return 0

    def _work(self) -> list[int]:
        """Tokens still to be computed of each prompt."""
        reported = self._stats.work
        ours = self._under_way.values()
        left = [min(one.to_compute, reported.get(one.request_id, one.to_compute)) for one in ours]
        known = {one.request_id for one in ours} | {one.request_id for _, one in self._ended}
        return left + [tokens for request_id, tokens in reported.items() if request_id not in known]

    def _forget_old(self) -> None:
        now_s = self._clock()
        while self._ended and self._ended[0][0] < now_s - _REPORT_LAG_S:
            self._remove(self._ended.popleft()[1])
        for call_id, sent_s in list(self._unaccepted.items()):
            if sent_s < now_s - _ACCEPT_S:
                self.forget(call_id)

    def _remove(self, sent: _Sent) -> None:
        for block in sent.blocks:
            self._sent_blocks[block] -= 1
            if not self._sent_blocks[block]:
                del self._sent_blocks[block]
