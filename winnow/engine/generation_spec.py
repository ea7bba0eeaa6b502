"""GenerationSpec: a decode request, and how many KV pages it needs."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from winnow.adapters.ref import kv_variant, variant_fingerprint
from winnow.adapters.rows import NO_ADAPTER
from winnow.adapters.slots import LoadedAdapter
from winnow.engine.kv_pool import KVPool
from winnow.engine.promises import Promise
from winnow.engine.query_ring import num_queries
from winnow.engine.windows import ENDLESS
from winnow.errors import InvalidSetting
from winnow.pruning_settings import Recompression
from winnow.sampling_params import SamplingParams

if TYPE_CHECKING:
    from winnow.grammar.constraint import CompiledGrammar  # loads llguidance and transformers
    from winnow.model_files import ModelDescription  # loads transformers


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
    grammar: what every answer must match, up to its end token.
    adapter: with which the prompt was prefilled, and every token is generated.
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
    grammar: "CompiledGrammar | None" = None
    adapter: LoadedAdapter | None = None

    def __post_init__(self) -> None:
        if self.grammar is not None and self.sampling.ignore_eos:
            raise InvalidSetting(
                "ignore_eos cannot be set with a grammar, whose end is the end token",
                param="ignore_eos",
            )

    @property
    def all_entries(self) -> int:
        """The most entries that one (layer, KV head) comes to, if none is dropped."""
        return self.max_prompt_entries + self.sampling.max_tokens

    @property
    def adapter_slot(self) -> int:
        return NO_ADAPTER if self.adapter is None else self.adapter.slot

    @property
    def num_positions(self) -> int:
        """The most tokens of a sequence, prompt and completion together."""
        return self.num_prompt_tokens + self.sampling.max_tokens

    def fingerprint_of(self, model: "ModelDescription") -> str:
        """What the request's KV was computed with: the model, its adapter, its rotary tables."""
        ref = None if self.adapter is None else self.adapter.ref
        variant = kv_variant(ref, is_long=model.is_long(self.num_positions))
        return variant_fingerprint(model.fingerprint, variant)

    @property
    def max_entries(self) -> int:
        """The most entries that one (layer, KV head) of a full layer can hold."""
        budget = self.recompression.decode_budget
        if budget is None:
            return self.all_entries
        return min(self.all_entries, max(self.max_prompt_entries, self.limit_at(budget)) + 1)

    def limit_at(self, budget: int | None) -> int:
        """Entries per head above which decode compresses back to `budget`."""
        return ENDLESS if budget is None else budget + self.recompression.recompress_interval


def promise_for(pool: KVPool, spec: GenerationSpec) -> Promise:
    """Pages to reserve for each sequence; `sure` always covers the KV that will arrive."""
    queries = query_pages(pool, spec)
    most = pool.pages_for(spec.max_entries, spec.all_entries) + queries
    if spec.assured or spec.moved:
        return Promise(most=most, sure=most)
    arriving = spec.max_prompt_entries + 1
    sure = pool.pages_for(min(arriving, spec.max_entries), arriving) + queries
    return Promise(most=most, sure=sure)


def query_pages(pool: KVPool, spec: GenerationSpec) -> int:
    """Pages for the query window of each sequence of the request."""
    recompression = spec.recompression
    window = recompression.window_size if recompression.observes else 0
    return pool.pages_for_queries(num_queries(pool, window))
