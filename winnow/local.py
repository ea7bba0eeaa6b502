"""The library interface: the service's prefill and decode engines in one process, no server."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow import defaults
from winnow.batch import BatchJob, BatchResult, BatchRun
from winnow.completion import Completion, CompletionStream, generation_spec, prefill_into
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.kv_pool import KVPoolConfig
from winnow.engine.prefill import require_prompt
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.sequence import Reservation
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import SamplingParams
from winnow.text_stream import TextStream
from winnow.tokenizer import Tokenizer, load_tokenizer

DEFAULT_MODEL = Path(__file__).parent.parent / "models" / "winnow-tiny"
DEFAULT_SAMPLING = SamplingParams(max_tokens=256, temperature=0)


class Winnow:
    """A loaded model with its tokenizer and engines.

    prefix_store: has the beginnings of earlier prompts; None: each prompt is computed whole.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        pruning: PruningSettings,
        pool_config: KVPoolConfig,
        max_batch_size: int = 1,
        prefix_store: PrefixStore | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pruning = pruning
        self.prefix_store = prefix_store
        self._engine = DecodeEngine(model, pool_config=pool_config, max_batch_size=max_batch_size)

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        max_model_len: int | None = None,
        kv_memory_bytes: int = 1 << 30,
        max_batch_size: int = 1,
        prefix_cache_bytes: int = 0,
        prefix_cache_device: str = "device",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_special_tokens: bool = False,
        **pruning: Any,  # noqa: ANN401 - checked by defaults.override
    ) -> "Winnow":
        """Load a model folder or hub model; `pruning` overrides the model's PruningSettings.

        max_model_len: see `describe_model`.
        max_batch_size: sequences that `generate_many` decodes together.
        prefix_cache_bytes: memory for the beginnings of prompts, which later prompts that begin
        alike do not compute again; 0: none.  prefix_cache_device: where they are kept, `device`
        (the model's) or `host`.
        chat_template_kwargs, allow_special_tokens: see Tokenizer.

        Raises UnusableModel, or InvalidSetting for an unknown or invalid setting.
        """
        decoder = load_model(model, device=device, dtype=dtype, max_model_len=max_model_len)
        path = decoder.description.path
        settings = defaults.pruning_defaults(decoder.description)
        settings = defaults.override(settings, pruning)
        settings.require_fits(decoder.shape.num_layers)
        tokenizer = load_tokenizer(
            path,
            chat_template_kwargs=chat_template_kwargs,
            allow_special_tokens=allow_special_tokens,
        )
        tokenizer.require_fits(decoder.vocab_size)
        pool_config = KVPoolConfig(kv_memory_bytes)
        store = PrefixStore.within(decoder, prefix_cache_bytes, prefix_cache_device)
        return cls(decoder, tokenizer, settings, pool_config, max_batch_size, store)

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams = DEFAULT_SAMPLING,
        stop: tuple[str, ...] = (),
        cache_salt: str = "",
    ) -> Completion:
        """Complete a prompt, given as text or token ids; greedy unless `sampling` says otherwise.

        The model's generation config sets the service's defaults, but not this method's.
        The completion ends before the first of the `stop` strings.
        cache_salt: only prompts with the same one share cached beginnings.
        Raises InvalidRequest, PromptTooLong, or InvalidSetting if its KV can never fit.
        """
        stream = self.stream(prompt, sampling, stop, cache_salt)
        text = "".join(stream)
        assert stream.finish_reason is not None
        return Completion(text, tuple(stream.token_ids), stream.finish_reason, stream.report)

    def generate_many(self, jobs: Iterable[BatchJob]) -> Iterator[BatchResult]:
        """Complete many prompts; results come in the order in which they finish.

        `jobs` is consumed lazily, as batch slots become free. Nothing else may run until the
        iterator is exhausted or closed.
        Raises as `generate` on reaching a job that can never run; see `require_fits`.
        """
        return BatchRun(self._engine, self.tokenizer, self.prefix_store).run(jobs)

    def require_fits(
        self, num_prompt_tokens: int, pruning: PruningSettings, sampling: SamplingParams
    ) -> None:
        """Raise the error that a prompt of this length would be refused with."""
        token_ids = [0] * num_prompt_tokens
        require_prompt(self.model, token_ids)
        pruning.require_fits(self.model.shape.num_layers)
        spec = generation_spec("local", self.model, token_ids, pruning, sampling)
        self._engine.release(self._engine.reserve(spec))

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams = DEFAULT_SAMPLING,
        stop: tuple[str, ...] = (),
        cache_salt: str = "",
    ) -> CompletionStream:
        """Stream a completion; the prompt has been prefilled when this returns.

        One stream at a time: exhaust or close it before starting the next.
        Raises as `generate`.
        """
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        require_prompt(self.model, token_ids)
        spec = generation_spec("local", self.model, token_ids, self.pruning, sampling)
        reservation = self._engine.reserve(spec)
        try:
            result = prefill_into(
                reservation, self.model, token_ids, self.pruning, self.prefix_store, cache_salt
            )
        except BaseException:
            self._engine.release(reservation)
            raise
        self._engine.start(reservation, result.final_hidden, result.report.next_position)
        stream = CompletionStream(result.report, iter(()))
        text = TextStream(self.tokenizer, stop, min_tokens=sampling.min_tokens)
        stream._pieces = self._decode(reservation, stream, text)
        return stream

    def _decode(
        self, reservation: Reservation, stream: CompletionStream, text: TextStream
    ) -> Iterator[str]:
        try:
            while stream.finish_reason is None:
                for output in self._engine.step():
                    yield stream.take(output, text)
            yield text.finish()
        finally:
            self._engine.release(reservation)
            self._engine.step()  # frees the pages of a stream that was closed early
