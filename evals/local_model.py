"""LocalModel: answers computed in this process; prefill one by one, decode in a batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

from evals.calibrate.recording import RecordedModel
from evals.model import Answer, Instance
from evals.tasks.base import Example
from evals.variants import Variant
from winnow import BatchJob, PruningSettings, SamplingParams, Winnow
from winnow.adapters.description import describe_adapter, room_for
from winnow.adapters.layers import described_sizes
from winnow.adapters.slots import LoadedAdapter
from winnow.decoder import DecoderModel
from winnow.defaults import override, pruning_defaults
from winnow.engine.kv_pool import KVPoolConfig
from winnow.engine.prefix.store import PrefixStore
from winnow.errors import InvalidSetting
from winnow.hub.reference import short_name
from winnow.kv import KvDtype
from winnow.load_options import LoadOptions
from winnow.model_files import describe_model
from winnow.models import load_model
from winnow.tokenizer import load_tokenizer


class LocalModel:
    """A model folder or hub model; its weights are loaded on first use, after all other checks.

    pruning: overrides the model's own settings; the variant's settings override both.
    record_window: compute a prompt's layers once for all its variants, none of which may have a
    wider window; None: each answer is computed, and timed, on its own.
    kv_dtype, prefix_cache_bytes, prefix_cache_device,
    prefix_cache_device_bytes: as in Winnow.load.  options: of `describe_model`.
    adapters: the folder of the one that answers, by its name; empty: the model alone does.
    A variant's prompts share beginnings with one another, but not with those of other variants,
    which would be timed as if they had computed them. The prefix cache is not used with
    record_window.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str,
        kv_dtype: KvDtype = "auto",
        kv_memory_bytes: int,
        max_batch_size: int,
        pruning: dict[str, Any],
        chat: bool,
        record_window: int | None = None,
        prefix_cache_bytes: int = 0,
        prefix_cache_device: str = "device",
        prefix_cache_device_bytes: int = 1 << 30,
        adapters: Mapping[str, Path] = MappingProxyType({}),
        **options: Unpack[LoadOptions],
    ) -> None:
        """Raises UnusableModel, UnusableAdapter, InvalidSetting, or InvalidRequest for a missing
        chat template.
        """
        self._name = short_name(model)
        self._description = describe_model(model, device=device, **options)
        usual = pruning_defaults(self._description)
        self._pruning = override(usual, pruning, self._description.shape)
        self.tokenizer = load_tokenizer(self._description.path)
        self.tokenizer.require_fits(self._description.vocab_size)
        self._chat = chat
        self._frame_tokens = len(self._frame(""))
        self._load_model = partial(
            load_model,
            self._description.path,
            device=device,
            adapter_room=room_for(adapters),
            **options,
        )
        self._adapters = adapters
        sizes = described_sizes(self._description) if adapters else {}
        self._adapter_digests = {
            name: describe_adapter(name, folder, sizes).digest for name, folder in adapters.items()
        }
        self._record_window = record_window
        self._open_prefix_store = partial(
            PrefixStore.within,
            prefix_cache_bytes=prefix_cache_bytes,
            prefix_cache_device=prefix_cache_device,
            prefix_cache_device_bytes=prefix_cache_device_bytes,
            kv_dtype=kv_dtype,
        )
        self.pool_config = KVPoolConfig(kv_memory_bytes, kv_dtype=kv_dtype)
        self._max_batch_size = max_batch_size

    @cached_property
    def decoder(self) -> DecoderModel:
        """The model with its weights."""
        return self._load_model()

    @cached_property
    def adapter(self) -> LoadedAdapter | None:
        """The one that answers, in its slot."""
        slots = self.decoder.adapters
        return None if slots is None else next(iter(slots.preload(self._adapters).values()))

    @cached_property
    def _winnow(self) -> Winnow:
        model, store = self.decoder, None
        if self._record_window is not None:
            model = RecordedModel(model, self._record_window)
        else:
            store = self.prefix_store
        return Winnow(
            model, self.tokenizer, self._pruning, self.pool_config, self._max_batch_size, store
        )

    @cached_property
    def prefix_store(self) -> PrefixStore | None:
        """None for 0 bytes."""
        return self._open_prefix_store(self.decoder)

    @property
    def max_positions(self) -> int:
        return self._description.max_positions

    @property
    def frame_tokens(self) -> int:
        return self._frame_tokens

    def identity(self) -> dict[str, Any]:
        return {
            "model": self._name,
            "fingerprint": self._description.fingerprint,
            "kv_dtype": self.pool_config.kv_dtype,
            "pruning": asdict(self._pruning),
            **({"adapters": self._adapter_digests} if self._adapters else {}),
        }

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def threshold(self, variant: Variant) -> float | None:
        return self.settings(variant).threshold

    def require_runs(
        self, variants: Sequence[Variant], num_prompt_tokens: int, max_new_tokens: int
    ) -> None:
        for variant in variants:
            self.settings(variant).require_fits(self._description.shape)
        for variant in variants:
            self._require_memory(variant, num_prompt_tokens, max_new_tokens)

    def _require_memory(
        self, variant: Variant, num_prompt_tokens: int, max_new_tokens: int
    ) -> None:
        pruning, sampling = self.settings(variant), _greedy(max_new_tokens)
        try:
            self._winnow.require_fits(num_prompt_tokens, pruning, sampling)
        except InvalidSetting as error:
            raise InvalidSetting(
                f"{variant}, {num_prompt_tokens:,} prompt tokens: {error.message} "
                "(--kv-memory-bytes)"
            ) from error

    def answers(self, instances: Iterable[Instance]) -> Iterator[tuple[Instance, Answer]]:
        taken: dict[int, Instance] = {}

        def jobs() -> Iterator[BatchJob]:
            for job_idx, instance in enumerate(instances):
                taken[job_idx] = instance
                yield self._job(instance)

        for result in self._winnow.generate_many(jobs()):
            completion, report = result.completion, result.completion.report
            answer = Answer(
                text=completion.text,
                num_prompt_tokens=report.num_prompt_tokens,
                num_answer_tokens=len(completion.token_ids),
                selection_layer=report.selection_layer,
                no_selection_reason=report.no_selection_reason,
                rho=report.rho,
                computed_share=report.computed_share,
                kv_bytes_full=report.kv_bytes_full,
                kv_bytes_kept=report.kv_bytes_kept,
                prefill_s=result.prefill_s,
                seconds=result.seconds,
            )
            yield taken.pop(result.job_idx), answer

    def _job(self, instance: Instance) -> BatchJob:
        return BatchJob(
            self.token_ids(instance.example),
            self.settings(instance.variant),
            _greedy(instance.example.max_new_tokens),
            cache_salt=str(instance.variant),
            adapter=self.adapter,
        )

    def token_ids(self, example: Example) -> list[int]:
        """The whole prompt, with the chat template's tokens if it is a chat."""
        if not self._chat:
            return self._frame(example.prompt())
        lead = self.tokenizer.encode(example.lead, add_special_tokens=False)
        return self._frame(example.user_message()) + lead

    def _frame(self, text: str) -> list[int]:
        """Token ids of the text as a whole prompt."""
        if self._chat:
            return self.tokenizer.render_chat([{"role": "user", "content": text}])
        return self.tokenizer.encode(text)

    def settings(self, variant: Variant) -> PruningSettings:
        """The settings for a variant; raises InvalidSetting if they are invalid."""
        own = {"method": variant.spec.method} | dict(variant.spec.options)
        window_size = override(self._pruning, own).window_size
        if variant.budget is not None and variant.budget <= window_size:
            raise InvalidSetting(
                f"--budget {variant.budget}: it must be above window_size, {window_size}",
                param="budget",
            )
        return override(self._pruning, variant.changes, self._description.shape)


def _greedy(max_new_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_new_tokens, temperature=0)
