"""Winnow in one process: the same engines as the service, no server."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow import defaults
from winnow.engine.decode import DecodeEngine, StepOutput
from winnow.engine.kv_pool import KVPoolConfig
from winnow.engine.prefill import PrefillResult, require_prompt, run_prefill
from winnow.engine.sequence import GenerationSpec, Reservation
from winnow.models import DecoderModel, load_model
from winnow.request import FinishReason, PrefillReport, PruningSettings, SamplingParams
from winnow.tokenizer import TextStream, Tokenizer, load_tokenizer

DEFAULT_MODEL = Path(__file__).parent.parent / "models" / "winnow-tiny"
DEFAULT_SAMPLING = SamplingParams(max_tokens=256, temperature=0)


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, with what was done to its prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    report: PrefillReport


class CompletionStream:
    """Iterates over pieces of text while they are generated; the fields fill up meanwhile."""

    def __init__(self, report: PrefillReport, pieces: Iterator[str]) -> None:
        self.report = report
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.recompressed_entries = 0
        self.kv_bytes = 0
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def take(self, output: StepOutput, text: TextStream) -> str:
        """Notes what a decode step gave and returns the text that it completed."""
        if output.error is not None:
            raise output.error
        (token,) = output.tokens
        self.token_ids.append(token.token_id)
        self.recompressed_entries, self.kv_bytes = output.recompressed_entries, output.kv_bytes
        piece = text.feed(token.token_id)
        self.finish_reason = FinishReason.STOP if text.stopped else token.finish_reason
        return piece


class Winnow:
    """A model with its tokenizer and both engines."""

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        pruning: PruningSettings,
        pool_config: KVPoolConfig,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pruning = pruning
        self._engine = DecodeEngine(model, pool_config=pool_config, max_batch_size=1)

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        kv_memory_bytes: int = 1 << 30,
        **pruning: Any,  # noqa: ANN401 - checked by defaults.override
    ) -> "Winnow":
        """A model folder or hub model; `pruning` overrides the model's own PruningSettings.

        Raises UnusableModel, or InvalidSetting for a setting that does not exist or cannot work.
        """
        decoder = load_model(model, device=device, dtype=dtype)
        path = decoder.description.path
        settings = defaults.pruning_defaults(path, decoder.shape.num_layers)
        settings = defaults.override(settings, pruning)
        settings.require_fits(decoder.shape.num_layers)
        return cls(decoder, load_tokenizer(path), settings, KVPoolConfig(kv_memory_bytes))

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams = DEFAULT_SAMPLING,
        stop: tuple[str, ...] = (),
    ) -> Completion:
        """The whole answer to a text or to token ids; greedy unless `sampling` says otherwise.

        The answer ends before the first of the `stop` strings.
        Raises InvalidRequest, PromptTooLong, or InvalidSetting if its KV can never fit.
        """
        stream = self.stream(prompt, sampling, stop)
        text = "".join(stream)
        assert stream.finish_reason is not None
        return Completion(text, tuple(stream.token_ids), stream.finish_reason, stream.report)

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams = DEFAULT_SAMPLING,
        stop: tuple[str, ...] = (),
    ) -> CompletionStream:
        """The answer piece by piece; the prompt has been prefilled when this returns.

        One stream at a time: iterate it to its end, or close it, before the next.
        Raises as `generate`.
        """
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        require_prompt(self.model, token_ids)
        reservation = self._engine.reserve(self._spec(token_ids, sampling))
        try:
            result = self._prefill(reservation, token_ids)
        except BaseException:
            self._engine.release(reservation)
            raise
        self._engine.start(reservation, result.final_hidden)
        stream = CompletionStream(result.report, iter(()))
        stream._pieces = self._decode(reservation, stream, stop)
        return stream

    def _spec(self, token_ids: list[int], sampling: SamplingParams) -> GenerationSpec:
        return GenerationSpec(
            request_id="local",
            num_prompt_tokens=len(token_ids),
            max_prompt_entries=self.pruning.max_prompt_entries(len(token_ids)),
            sampling=sampling,
            decode_budget=self.pruning.decode_budget,
            recompress_interval=self.pruning.recompress_interval,
            window_size=self.pruning.window_size,
            kernel_size=self.pruning.kernel_size,
            prompt_token_ids=tuple(token_ids) if sampling.needs_prompt else (),
        )

    def _prefill(self, reservation: Reservation, token_ids: list[int]) -> PrefillResult:
        layers = run_prefill(self.model, token_ids, self.pruning)
        while True:
            try:
                reservation.write_layer(next(layers))
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    def _decode(
        self, reservation: Reservation, stream: CompletionStream, stop: tuple[str, ...]
    ) -> Iterator[str]:
        text = TextStream(self.tokenizer, stop)
        try:
            while stream.finish_reason is None:
                for output in self._engine.step():
                    yield stream.take(output, text)
            yield text.finish()
        finally:
            self._engine.release(reservation)
            self._engine.step()  # frees the pages of a stream that was closed early
