"""Answers a conversation's questions: each from scratch, with the prefix store, or from remains."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from evals.local_model import LocalModel
from evals.tasks.base import Example
from evals.turns.kept_document import KeptDocument
from evals.variants import Variant
from winnow import SamplingParams
from winnow.adapters.rows import applied
from winnow.completion import generation_spec
from winnow.engine.decode import DecodeEngine
from winnow.engine.prefill import PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.kv import LayerKV
from winnow.pruning_settings import PruningSettings
from winnow.text_stream import TextStream
from winnow.tokens import FinishReason, Token

# In decode: what prefill has kept stays.
_ALL_ENTRIES = PruningSettings(method="full", compression="none", kv_budget=None)

SCRATCH, STORE, KEPT = "from scratch", "prefix store", "kept from turn 1"


@dataclass(frozen=True, slots=True)
class Way:
    """A variant, and what becomes of the document's KV: one of SCRATCH, STORE, KEPT."""

    variant: Variant
    reuse: str

    def __str__(self) -> str:
        return f"{self.variant}, {self.reuse}"


@dataclass(frozen=True, slots=True)
class TurnAnswer:
    """computed_share: layer-tokens computed, of all of the prompt.

    ttft_s: from the prompt's arrival to its first token.
    """

    text: str
    num_prompt_tokens: int
    computed_share: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class _Prefilled:
    layers: list[LayerKV]
    final_hidden: Tensor
    next_position: int
    computed_share: float


class Answering:
    """Answers one question at a time, so that times are those of an idle machine."""

    def __init__(self, model: LocalModel, store: PrefixStore) -> None:
        self._model = model
        self._store = store
        self._engine = DecodeEngine(model.decoder, pool_config=model.pool_config, max_batch_size=1)

    def answers(self, turns: Sequence[Example], way: Way) -> Iterator[TurnAnswer]:
        """The greedy answer of each turn, in order."""
        prompts = [self._model.token_ids(example) for example in turns]
        num_shared = _num_shared(prompts)
        pruning, kept = self._model.settings(way.variant), None
        for example, token_ids in zip(turns, prompts, strict=True):
            started_s = time.perf_counter()
            if kept is None:
                num_positions = len(token_ids) + example.max_new_tokens
                is_long = self._model.decoder.description.is_long(num_positions)
                prefilled = self._prefill(token_ids, pruning, way, is_long=is_long)
                if way.reuse == KEPT:
                    decoder, layers = self._model.decoder, prefilled.layers
                    kept = KeptDocument(decoder, layers, num_shared, is_long=is_long)
            else:
                prefilled = self._extend(kept, token_ids)
            yield self._generate(prefilled, token_ids, example.max_new_tokens, started_s)

    def _prefill(
        self, token_ids: Sequence[int], pruning: PruningSettings, way: Way, *, is_long: bool
    ) -> _Prefilled:
        run = PrefillRun(
            self._model.decoder,
            token_ids,
            pruning,
            store=self._store if way.reuse == STORE else None,
            cache_salt=str(way),
            adapter=self._model.adapter,
            is_long=is_long,
        )
        layers = list(run.layers())
        result = run.result()
        report = result.report
        return _Prefilled(layers, result.final_hidden, report.next_position, report.computed_share)

    def _extend(self, kept: KeptDocument, token_ids: Sequence[int]) -> _Prefilled:
        adapter = self._model.adapter
        with applied(None if adapter is None else adapter.rows):
            layers, final_hidden = kept.prefill(token_ids)
        num_tokens = len(token_ids)
        return _Prefilled(
            layers, final_hidden, num_tokens, (num_tokens - kept.num_tokens) / num_tokens
        )

    def _generate(
        self, prefilled: _Prefilled, token_ids: Sequence[int], max_tokens: int, started_s: float
    ) -> TurnAnswer:
        engine, sampling = self._engine, SamplingParams(max_tokens=max_tokens, temperature=0)
        spec = generation_spec(
            *("turn", self._model.decoder, token_ids, _ALL_ENTRIES, sampling),
            adapter=self._model.adapter,
        )
        reservation = engine.reserve(spec)
        try:
            for layer in prefilled.layers:
                reservation.write_layer(layer)
            engine.start(reservation, prefilled.final_hidden, prefilled.next_position)
            text = TextStream(self._model.tokenizer)
            pieces, ttft_s = [], 0.0
            for token in self._tokens():
                ttft_s = ttft_s or time.perf_counter() - started_s
                is_end = token.finish_reason is FinishReason.STOP
                pieces.append(text.feed(token.token_id, is_end=is_end))
        finally:
            engine.release(reservation)
        answer = "".join(pieces) + text.finish()
        return TurnAnswer(answer, len(token_ids), prefilled.computed_share, ttft_s)

    def _tokens(self) -> Iterator[Token]:
        """The tokens of the one sequence that runs, as they are generated."""
        while True:
            for output in self._engine.step():
                if output.error is not None:
                    raise output.error
                yield from output.tokens
                if output.finished:
                    return


def _num_shared(prompts: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all prompts begin with; each has at least one more."""
    shared = takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in shared), min(map(len, prompts)) - 1)
