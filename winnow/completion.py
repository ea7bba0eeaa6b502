"""One completion: the requests to the engines for it, and its result."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from winnow.adapters.slots import LoadedAdapter
from winnow.checks import require_token_ids
from winnow.decoder import DecoderModel
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.outputs import StepOutput
from winnow.engine.prefill import PrefillResult, PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.sequence import Reservation
from winnow.grammar.constraint import CompiledGrammar
from winnow.pruning_settings import PruningSettings
from winnow.report import PrefillReport
from winnow.sampling_params import SamplingParams
from winnow.text_stream import TextStream
from winnow.tokens import FinishReason

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished completion, with the prefill report of its prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    report: PrefillReport


class CompletionStream:
    """Iterates over pieces of text as they are generated; the fields are updated on the way.

    Closing its iterator ends the completion early.
    """

    def __init__(self, report: PrefillReport) -> None:
        self.report = report
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.recompressed_entries = 0
        self.pieces: Generator[str] | None = None

    def __iter__(self) -> Generator[str]:
        assert self.pieces is not None
        return self.pieces

    def take(self, output: StepOutput, text: TextStream) -> str:
        """Record the output of a decode step; returns the text that it completes.

        Raises the output's error, if it has one.
        """
        if output.error is not None:
            raise output.error
        (token,) = output.tokens
        self.token_ids.append(token.token_id)
        self.recompressed_entries = output.recompressed_entries
        piece = text.feed(token.token_id, is_end=token.finish_reason is FinishReason.STOP)
        self.finish_reason = FinishReason.STOP if text.stopped else token.finish_reason
        return piece


def generation_spec(
    request_id: str,
    model: DecoderModel,
    token_ids: Sequence[int],
    pruning: PruningSettings,
    sampling: SamplingParams,
    grammar: CompiledGrammar | None = None,
    adapter: LoadedAdapter | None = None,
) -> GenerationSpec:
    """The decode request for one prompt with these pruning and sampling settings.

    Raises InvalidSetting for a token that the model does not have.
    """
    require_token_ids("logit_bias", sampling.logit_bias, model.vocab_size)
    require_token_ids("stop_token_ids", sampling.stop_token_ids, model.vocab_size)
    num_tokens = len(token_ids)
    return GenerationSpec(
        request_id=request_id,
        num_prompt_tokens=num_tokens,
        max_prompt_entries=pruning.max_prompt_entries(num_tokens, model.shape.num_kv_heads),
        sampling=sampling,
        recompression=pruning.decode_side,
        prompt_token_ids=tuple(token_ids) if sampling.needs_prompt else (),
        grammar=grammar,
        adapter=adapter,
    )


def prefill_into(
    reservation: Reservation,
    model: DecoderModel,
    token_ids: Sequence[int],
    pruning: PruningSettings,
    store: PrefixStore | None = None,
    cache_salt: str = "",
) -> PrefillResult:
    """Prefill a prompt, with the reservation's adapter, and write its kept KV into it.

    store, cache_salt: see PrefillRun.
    """
    return run_to_end(prefill_by_layer(reservation, model, token_ids, pruning, store, cache_salt))


def prefill_by_layer(
    reservation: Reservation,
    model: DecoderModel,
    token_ids: Sequence[int],
    pruning: PruningSettings,
    store: PrefixStore | None = None,
    cache_salt: str = "",
) -> Generator[None, None, PrefillResult]:
    """As `prefill_into`, pausing after each layer; closing it ends the prefill."""
    run = PrefillRun(
        model,
        token_ids,
        pruning,
        store=store,
        cache_salt=cache_salt,
        adapter=reservation.spec.adapter,
        is_long=model.description.is_long(reservation.spec.num_positions),
    )
    with closing(run):
        while not run.finished:
            layer = run.compute_layer()
            if layer is not None:
                reservation.write_layer(layer)
            yield
        return run.result()


def run_to_end(steps: Generator[None, None, _T]) -> _T:
    """What the generator returns, once it has run to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _T = end.value
            return result
