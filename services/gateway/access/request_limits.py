"""Limits of requests, from the model and from the operator's settings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from services.common.settings import Settings
from services.gateway.access.pruning_caps import (
    changed_pruning,
    require_within_caps,
    unpruned,
)
from services.gateway.served_adapters import ServedAdapters
from services.gateway.served_model import ServedModel
from winnow.adapters.ref import AdapterRef
from winnow.errors import InvalidRequest, InvalidSetting, PromptTooLong, UnknownModel
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

ANY_MODEL = "*"  # among the aliases: every name is taken
MAX_MODEL_NAME_CHARS = 256
MAX_STOP_CHARS = 1024
_NAMES_SHOWN = 8
MAX_CACHE_SALT_CHARS = 256
# English has 4 to 5 characters per token; of a much longer text only the start is tokenized.
_CHARS_PER_TOKEN = 6


class RequestLimits:
    """Checks whose errors have number and limit.  Raises InvalidSetting if settings contradict."""

    def __init__(
        self, settings: Settings, model: ServedModel, adapters: ServedAdapters | None = None
    ) -> None:
        self._settings = settings
        self._adapters = adapters
        self._model = model
        self._vocab_size = model.description.vocab_size
        self.sampling_defaults = model.generation.sampling
        self.max_positions = model.description.max_positions
        self.max_prompt_tokens = min(
            settings.max_prompt_tokens or self.max_positions, self.max_positions - 1
        )
        self.max_output_tokens = min(settings.max_new_tokens, self.max_positions - 1)
        require_within_caps(settings, model.pruning)

    def require_model(self, name: str) -> AdapterRef | None:
        """The adapter of that name; None if it is the served model's, or one of its aliases.

        Raises UnknownModel for any other.
        """
        aliases = self._settings.model_aliases
        if name in (self._model.name, *aliases):
            return None
        adapter = None if self._adapters is None else self._adapters.find(name)
        if adapter is not None:
            return adapter
        if len(name) > MAX_MODEL_NAME_CHARS:
            raise UnknownModel(
                f"model has {len(name):,} characters; the limit is {MAX_MODEL_NAME_CHARS}",
                param="model",
            )
        if not name or ANY_MODEL not in aliases:
            raise UnknownModel(
                f"model {name!r} is not served here; served is {self._served()}", param="model"
            )
        return None

    def _served(self) -> str:
        names = [self._model.name, *(self._adapters.names if self._adapters else ())]
        more = len(names) - _NAMES_SHOWN
        return ", ".join(map(repr, names[:_NAMES_SHOWN])) + (
            f" and {more} more" if more > 0 else ""
        )

    def require_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raises InvalidRequest for a token ID that is not in the vocabulary."""
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self._vocab_size):
            bad = next(i for i in token_ids if not 0 <= i < self._vocab_size)
            raise InvalidRequest(
                f"{param} has token id {bad}; the vocabulary goes from 0 to {self._vocab_size - 1}",
                param=param,
            )

    def require_prompt(self, num_tokens: int, param: str) -> None:
        """Raises InvalidRequest for an empty prompt, PromptTooLong for one over the limit."""
        if num_tokens == 0:
            raise InvalidRequest(f"{param} is empty; it must have at least 1 token", param=param)
        if num_tokens > self.max_prompt_tokens:
            raise self._too_long(f"{num_tokens:,}", param)

    def require_positions(self, num_tokens: int, param: str) -> None:
        """Raises InvalidRequest for more tokens than prompt and answer may have together."""
        if num_tokens > self.max_positions:
            raise InvalidRequest(
                f"{param} has {num_tokens:,} tokens; the limit is {self.max_positions:,}",
                param=param,
            )

    def encode(self, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize a prompt; one far over the limit is refused without tokenizing all of it.

        Raises InvalidRequest for an empty text, PromptTooLong for one over the limit.
        """
        if not text:
            self.require_prompt(0, param)
        encode = self._model.tokenizer.encode
        bound = self.max_prompt_tokens * _CHARS_PER_TOKEN
        if len(text) > bound:
            at_least = len(encode(text[:bound], add_special_tokens=add_special_tokens))
            if at_least > self.max_prompt_tokens:
                raise self._too_long(f"at least {at_least:,}", param)
        token_ids = encode(text, add_special_tokens=add_special_tokens)
        self.require_prompt(len(token_ids), param)
        return token_ids

    def _too_long(self, num_tokens: str, param: str) -> PromptTooLong:
        return PromptTooLong(
            f"prompt has {num_tokens} tokens; the limit is {self.max_prompt_tokens:,}", param=param
        )

    def max_tokens(
        self,
        requested: int | None,
        default: int | None,
        num_prompt_tokens: int,
        param: str,
        *,
        least: int = 1,
    ) -> int:
        """The most tokens of an answer; if `default` is None, the model's default or all allowed.

        With max_tokens_policy `clamp`, a number over the limit becomes the limit.
        Raises InvalidSetting for a number out of range, PromptTooLong if prompt and answer exceed
        the model's context.
        """
        left = self.max_positions - num_prompt_tokens
        most = self._settings.max_new_tokens
        if requested is None:
            if default is None:
                default = self._model.generation.max_new_tokens or most
            return min(default, most, left)
        if self._settings.max_tokens_policy == "clamp":
            requested = min(requested, most, left)
        if not least <= requested <= most:
            raise InvalidSetting(
                f"{param} is {requested:,}; the allowed range is {least} to {most:,}", param=param
            )
        if requested > left:
            raise PromptTooLong(
                f"prompt of {num_prompt_tokens:,} tokens and {param} of {requested:,} make "
                f"{num_prompt_tokens + requested:,}; the model's limit is {self.max_positions:,}",
                param=param,
            )
        return requested

    def require_choices(self, n: int) -> None:
        """Raises InvalidSetting if n is 0 or over the limit."""
        most = self._settings.max_n
        if not 1 <= n <= most:
            raise InvalidSetting(f"n is {n:,}; the allowed range is 1 to {most}", param="n")

    def require_stop(self, stop: Sequence[str]) -> None:
        """Raises InvalidSetting for too many stop strings, an empty one, or one too long."""
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidSetting(
                f"stop has {len(stop):,} strings; the limit is {MAX_STOP_STRINGS}", param="stop"
            )
        for idx, text in enumerate(stop):
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise InvalidSetting(
                    f"stop[{idx}] has {len(text):,} characters; the allowed range is 1 to "
                    f"{MAX_STOP_CHARS:,}",
                    param="stop",
                )

    def require_cache_salt(self, cache_salt: str | None) -> None:
        """Raises InvalidSetting for a salt that is empty or too long, without showing it."""
        if cache_salt is not None and not 1 <= len(cache_salt) <= MAX_CACHE_SALT_CHARS:
            raise InvalidSetting(
                f"cache_salt has {len(cache_salt):,} characters; the allowed range is 1 to "
                f"{MAX_CACHE_SALT_CHARS}",
                param="cache_salt",
            )

    def stop_token_ids(self, token_ids: Sequence[int]) -> frozenset[int]:
        """Raises InvalidSetting for too many, InvalidRequest for one not in the vocabulary."""
        if len(token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidSetting(
                f"stop_token_ids has {len(token_ids):,} tokens; the limit is {MAX_STOP_TOKEN_IDS}",
                param="stop_token_ids",
            )
        self.require_token_ids(token_ids, "stop_token_ids")
        return frozenset(token_ids)

    def pruning(
        self, changes: Mapping[str, Any], *, scores_prompt: bool = False
    ) -> PruningSettings:
        """The service's settings with a request's changes.  Raises as `changed_pruning`.

        scores_prompt: prompt log-probabilities are requested, which need the unpruned prompt.
        """
        pruning = self._model.pruning
        if changes:
            shape = self._model.description.shape
            pruning = changed_pruning(self._settings, pruning, shape, changes)
        if scores_prompt:
            reason = "echo with logprobs computes the prompt unpruned"
            pruning = unpruned(self._settings, pruning, reason, "echo")
        return pruning

    def verifying(self, pruning: PruningSettings) -> PruningSettings:
        """For the answer that one under `pruning` is compared with: decode keeps all as well.

        Raises InvalidSetting where that is over a cap.
        """
        whole = replace(pruning, decode_budget=None, decode_floor=None)
        reason = "verify generates the unpruned answer too"
        return unpruned(self._settings, whole, reason, "winnow.verify")
