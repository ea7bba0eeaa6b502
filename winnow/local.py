"""The library interface: the service's prefill and decode engines in one process, no server."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

from winnow import defaults
from winnow.adapters.description import room_for
from winnow.adapters.slots import LoadedAdapter
from winnow.batch import BatchJob, BatchResult, BatchRun
from winnow.completion import (
    Completion,
    CompletionStream,
    generation_spec,
    prefill_by_layer,
    run_to_end,
)
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.graph import recorder_for
from winnow.engine.kv_pool import KVPoolConfig
from winnow.engine.prefill import require_prompt
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.sequence import Reservation
from winnow.errors import UnknownModel
from winnow.grammar import Grammar
from winnow.grammar.compiler import GrammarCompiler
from winnow.kv import require_kv_dtype
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
    adapters: those that can answer, by their names.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        pruning: PruningSettings,
        pool_config: KVPoolConfig,
        max_batch_size: int = 1,
        prefix_store: PrefixStore | None = None,
        adapters: Mapping[str, LoadedAdapter] = MappingProxyType({}),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pruning = pruning
        self.prefix_store = prefix_store
        self.adapters = adapters
        self._grammars = GrammarCompiler(tokenizer, model.vocab_size, model.eos_token_ids)
        self._engine = DecodeEngine(
            model,
            pool_config=pool_config,
            max_batch_size=max_batch_size,
            new_recorder=recorder_for(model.device),
        )

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        max_model_len: int | None = None,
        quantize: str | None = None,
        dequantize: bool = False,
        kv_dtype: str = "auto",
        kv_memory_bytes: int = 1 << 30,
        max_batch_size: int = 1,
        prefix_cache_bytes: int = 0,
        prefix_cache_device: str = "device",
        prefix_cache_device_bytes: int = 1 << 30,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_special_tokens: bool = False,
        adapters: Mapping[str, str | Path] | None = None,
        **pruning: Any,  # noqa: ANN401 - checked by defaults.override
    ) -> "Winnow":
        """Load a model folder or hub model; `pruning` overrides the model's PruningSettings.

        max_model_len, quantize, dequantize: see `describe_model`.
        kv_dtype: of keys and values in the pool and among the prefixes: `auto` (the dtype) or
        `int8`, about half of 16 bits.
        max_batch_size: sequences that `generate_many` decodes together.
        prefix_cache_bytes: memory for the beginnings of prompts, which later prompts that begin
        alike do not compute again; 0: none.  prefix_cache_device: where they are kept, `device`
        (the model's) or `host`.  prefix_cache_device_bytes: with `host`, a GPU's memory for what
        was used last, besides prefix_cache_bytes.
        chat_template_kwargs, allow_special_tokens: see Tokenizer.
        adapters: folders of LoRA adapters, by the names that `generate` takes.

        Raises UnusableModel, UnusableAdapter, or InvalidSetting for an unknown or invalid setting.
        """
        decoder = load_model(
            model,
            device=device,
            adapter_room=room_for(adapters or {}),
            dtype=dtype,
            max_model_len=max_model_len,
            quantize=quantize,
            dequantize=dequantize,
        )
        path = decoder.description.path
        settings = defaults.pruning_defaults(decoder.description)
        settings = defaults.override_for(settings, pruning, decoder.shape)
        tokenizer = load_tokenizer(
            path,
            chat_template_kwargs=chat_template_kwargs,
            allow_special_tokens=allow_special_tokens,
        )
        tokenizer.require_fits(decoder.vocab_size)
        held_as = require_kv_dtype(kv_dtype)
        pool_config = KVPoolConfig(kv_memory_bytes, kv_dtype=held_as)
        store = PrefixStore.within(
            decoder,
            prefix_cache_bytes,
            prefix_cache_device,
            held_as,
            prefix_cache_device_bytes=prefix_cache_device_bytes,
        )
        loaded = {} if decoder.adapters is None else decoder.adapters.preload(adapters or {})
        return cls(decoder, tokenizer, settings, pool_config, max_batch_size, store, loaded)

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams = DEFAULT_SAMPLING,
        stop: tuple[str, ...] = (),
        cache_salt: str = "",
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> Completion:
        """Complete a prompt, given as text or token ids; greedy unless `sampling` says otherwise.

        The model's generation config sets the service's defaults, but not this method's.
        The completion ends before the first of the `stop` strings.
        cache_salt: only prompts with the same one share cached beginnings.
        grammar: what the text must match, if it ends before max_tokens.
        adapter: the name of the one that answers; None: the model alone does.
        Raises InvalidRequest, PromptTooLong, InvalidGrammar, UnknownModel, or InvalidSetting if its
        KV can never fit.
        """
        stream = self.stream(prompt, sampling, stop, cache_salt, grammar, adapter)
        text = "".join(stream)
        assert stream.finish_reason is not None
        return Completion(text, tuple(stream.token_ids), stream.finish_reason, stream.report)

    def generate_many(self, jobs: Iterable[BatchJob]) -> Iterator[BatchResult]:
        """Complete many prompts; results come in the order in which they finish.

        `jobs` is consumed lazily, as batch slots become free. Nothing else may run until the
        iterator is exhausted or closed.
        Raises as `generate` on reaching a job that can never run; see `require_fits`.
        """
        return BatchRun(self._engine, self.tokenizer, self._grammars, self.prefix_store).run(jobs)

    def require_fits(
        self, num_prompt_tokens: int, pruning: PruningSettings, sampling: SamplingParams
    ) -> None:
        """Raise the error that a prompt of this length would be refused with."""
        token_ids = [0] * num_prompt_tokens
        require_prompt(self.model, token_ids)
        pruning.require_fits(self.model.shape)
        spec = generation_spec("local", self.model, token_ids, pruning, sampling)
        self._engine.release(self._engine.reserve(spec))

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams = DEFAULT_SAMPLING,
        stop: tuple[str, ...] = (),
        cache_salt: str = "",
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> CompletionStream:
        """Stream a completion; the prompt has been prefilled when this returns.

        One stream at a time: exhaust or close it before starting the next.
        Raises as `generate`.
        """
        steps = self.stream_by_layer(prompt, sampling, stop, cache_salt, grammar, adapter)
        return run_to_end(steps)

    def stream_by_layer(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams = DEFAULT_SAMPLING,
        stop: tuple[str, ...] = (),
        cache_salt: str = "",
        grammar: Grammar | None = None,
        adapter: str | None = None,
        shown_token_ids: Set[int] = frozenset(),
    ) -> Generator[None, None, CompletionStream]:
        """As `stream`, pausing after each layer of the prompt; returns the stream at its end.

        shown_token_ids: control tokens that are part of the text.  Closing it ends the prefill.
        """
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        require_prompt(self.model, token_ids)
        compiled = self._grammars.compile(grammar) if grammar is not None else None
        spec = generation_spec(
            *("local", self.model, token_ids, self.pruning, sampling, compiled),
            adapter=None if adapter is None else self.adapter(adapter),
        )
        reservation = self._engine.reserve(spec)
        try:
            result = yield from prefill_by_layer(
                reservation, self.model, token_ids, self.pruning, self.prefix_store, cache_salt
            )
        except BaseException:
            self._engine.release(reservation)
            raise
        self._engine.start(reservation, result.final_hidden, result.report.next_position)
        stream = CompletionStream(result.report)
        text = TextStream(
            self.tokenizer,
            stop,
            min_tokens=sampling.min_tokens,
            shown_token_ids=shown_token_ids,
        )
        stream.pieces = self._decode(reservation, stream, text)
        return stream

    def adapter(self, name: str) -> LoadedAdapter:
        """Raises UnknownModel."""
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UnknownModel(f"adapter {name!r} is not loaded; loaded are {known}", param="model")
        return self.adapters[name]

    def _decode(
        self, reservation: Reservation, stream: CompletionStream, text: TextStream
    ) -> Generator[str]:
        try:
            while stream.finish_reason is None:
                for output in self._engine.step():
                    if stream.finish_reason is None:
                        yield stream.take(output, text)
            yield text.finish()
        finally:
            self._engine.release(reservation)
            while self._engine.stats().running_sequences:
                self._engine.step()  # frees the pages of a stream that was closed early
