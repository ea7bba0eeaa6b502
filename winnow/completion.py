"""One completion: the requests to the engines for it, and its result."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from winnow.checks import require_token_ids
from winnow.decoder import DecoderModel
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.outputs import StepOutput
from winnow.engine.prefill import PrefillResult, PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.sequence import Reservation
from winnow.pruning_settings import PruningSettings
from winnow.report import PrefillReport
from winnow.sampling_params import SamplingParams
from winnow.text_stream import TextStream
from winnow.tokens import FinishReason


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished completion, with the prefill report of its prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    report: PrefillReport


class CompletionStream:
    """Iterates over pieces of text as they are generated; the fields are updated on the way."""

    def __init__(self, report: PrefillReport, pieces: Iterator[str]) -> None:
        self.report = report
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.recompressed_entries = 0
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def take(self, output: StepOutput, text: TextStream) -> str:
        """Record the output of a decode step; returns the text that it completes."""
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
    )


def prefill_into(
    reservation: Reservation,
    model: DecoderModel,
    token_ids: Sequence[int],
    pruning: PruningSettings,
    store: PrefixStore | None = None,
    cache_salt: str = "",
) -> PrefillResult:
    """Prefill a prompt and write its kept KV into the reservation.

    store, cache_salt: see PrefillRun.
    """
    with closing(PrefillRun(model, token_ids, pruning, store=store, cache_salt=cache_salt)) as run:
        for layer in run.layers():
            reservation.write_layer(layer)
        return run.result()
