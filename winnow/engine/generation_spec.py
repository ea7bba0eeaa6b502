"""GenerationSpec: a decode request, and how many KV pages it needs."""

from dataclasses import dataclass, field

from winnow.engine.kv_pool import KVPool
from winnow.engine.promises import Promise
from winnow.engine.query_ring import num_queries
from winnow.pruning_settings import Recompression
from winnow.sampling_params import SamplingParams

_ENDLESS = 2**62


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """What decode generates from one prompt. Sequence i of `num_sequences` samples with seed + i.

    max_prompt_entries: the most KV entries per (layer, KV head) that prefill will send.
    recompression: how the KV cache is compressed during decode.
    prompt_token_ids: only needed if `sampling.needs_prompt`.
    replayed: per sequence, tokens that a lost worker had already generated. They are fed to the
    model one by one instead of being sampled. Empty: none.
    assured: pages are reserved up to the last token, so the request is never preempted.
    moved: the request migrates here with its current KV, which may be larger than its prompt's.
    """

    request_id: str
    num_prompt_tokens: int
    max_prompt_entries: int
    sampling: SamplingParams
    num_sequences: int = 1
    recompression: Recompression = field(default_factory=Recompression)
    prompt_token_ids: tuple[int, ...] = ()
    replayed: tuple[tuple[int, ...], ...] = ()
    assured: bool = False
    moved: bool = False

    @property
    def max_entries(self) -> int:
        """The most entries that one (layer, KV head) can hold."""
        unbounded = self.max_prompt_entries + self.sampling.max_tokens
        budget = self.recompression.decode_budget
        if budget is None:
            return unbounded
        return min(unbounded, max(self.max_prompt_entries, self.limit_at(budget)) + 1)

    def limit_at(self, budget: int | None) -> int:
        """Entries per head above which decode compresses back to `budget`."""
        return _ENDLESS if budget is None else budget + self.recompression.recompress_interval


def promise_for(pool: KVPool, spec: GenerationSpec) -> Promise:
    """Pages to reserve for each sequence; `sure` always covers the KV that will arrive."""
    most = spec.max_entries
    sure = most if spec.assured or spec.moved else min(spec.max_prompt_entries + 1, most)
    queries = query_pages(pool, spec)
    return Promise(most=pool.pages_for(most) + queries, sure=pool.pages_for(sure) + queries)


def query_pages(pool: KVPool, spec: GenerationSpec) -> int:
    """Pages for the query window of each sequence of the request."""
    recompression = spec.recompression
    window = recompression.window_size if recompression.observes else 0
    return pool.pages_for_queries(num_queries(pool, window))
