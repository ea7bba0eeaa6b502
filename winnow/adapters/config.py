"""An adapter's adapter_config.json: what PEFT's LoRA says of ranks, scales and targets.

Names and meanings are those of peft.LoraConfig. What would change an answer and is not computed
here is refused.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from winnow.errors import UnusableAdapter

T = TypeVar("T")

ALL_LINEAR = "all-linear"
# Options that change what an adapter computes, besides A and B.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules of its own",
    "trainable_token_indices": "embeddings of its own",
    "layer_replication": "repeated layers",
    "lora_bias": "biases of its own",
    "alora_invocation_tokens": "an activation by tokens",
    "use_bdlora": "block-diagonal matrices",
    "use_qalora": "grouped inputs",
    "target_parameters": "parameters that are no linear layer's",
}
# Ways to begin that train against other base weights than the model's.
_CHANGES_BASE = ("pissa", "olora", "corda")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """rank, alpha: unless a pattern for the module says otherwise.

    targets: names, or a regular expression.  layers: only these are adapted; None: all.
    """

    rank: int
    alpha: float
    is_rank_stabilized: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: frozenset[int] | None

    @property
    def max_rank(self) -> int:
        return max((self.rank, *self.rank_pattern.values()))

    def targets(self, modules: Iterable[str]) -> list[str]:
        """Those of the modules that the adapter says it adapts."""
        return [module for module in modules if self._is_target(module)]

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor of B (A x): alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return float(alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank))

    def _is_target(self, module: str) -> bool:
        if self.target_modules != ALL_LINEAR and not _matches(self.target_modules, module):
            return False
        if _matches(self.excluded, module):
            return False
        return self.layers is None or _layer_of(module) in self.layers


def read_config(file: Path) -> LoraConfig:
    """Raises UnusableAdapter for what is not supported, and others for what cannot be read."""
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise ValueError("adapter_config.json holds no object")
    _require_supported(file, content)
    options = _Options(file, content)
    return LoraConfig(
        rank=options.rank("r", content.get("r", 8)),
        alpha=options.alpha("lora_alpha", content.get("lora_alpha", 8)),
        is_rank_stabilized=options.flag("use_rslora"),
        rank_pattern=options.by_pattern("rank_pattern", options.rank),
        alpha_pattern=options.by_pattern("alpha_pattern", options.alpha),
        target_modules=options.names("target_modules"),
        excluded=options.names("exclude_modules"),
        layers=options.layers("layers_to_transform"),
    )


def _require_supported(file: Path, content: Mapping[str, Any]) -> None:
    kind = content.get("peft_type")
    if kind != "LORA":
        raise UnusableAdapter(f"{file}: peft_type is {kind!r}; Winnow runs LORA")
    for option, what in _UNSUPPORTED.items():
        if content.get(option):
            raise UnusableAdapter(
                f"{file}: {option} is {content[option]!r}, that is {what}; Winnow runs plain LoRA"
            )
    if content.get("bias", "none") != "none":
        raise UnusableAdapter(
            f"{file}: bias is {content['bias']!r}; Winnow runs adapters with none"
        )
    begun = str(content.get("init_lora_weights", ""))
    if begun.lower().startswith(_CHANGES_BASE):
        raise UnusableAdapter(
            f"{file}: init_lora_weights is {begun!r}, which trains against other base weights; "
            "convert it to plain LoRA first (path_initial_model_for_weight_conversion)"
        )


@dataclass(frozen=True, slots=True)
class _Options:
    """Reads options of a file; raises UnusableAdapter for one that is not what it has to be."""

    file: Path
    content: Mapping[str, Any]

    def refusal(self, option: str, value: object, wanted: str) -> UnusableAdapter:
        return UnusableAdapter(f"{self.file}: {option} is {value!r}; it is {wanted}")

    def flag(self, option: str) -> bool:
        value = self.content.get(option) or False
        if not isinstance(value, bool):
            raise self.refusal(option, value, "true or false")
        return value

    def rank(self, option: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refusal(option, value, "a whole number of at least 1")
        return value

    def alpha(self, option: str, value: object) -> float:
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
        ):
            raise self.refusal(option, value, "a finite number")
        return float(value)

    def by_pattern(self, option: str, parse: Callable[[str, object], T]) -> dict[str, T]:
        """The values of patterns of modules' names."""
        value = self.content.get(option) or {}
        if not isinstance(value, dict):
            raise self.refusal(option, value, "an object")
        for pattern in value:
            self._require_pattern(option, pattern)
        return {key: parse(f"{option} of {key}", one) for key, one in value.items()}

    def names(self, option: str) -> str | tuple[str, ...]:
        value = self.content.get(option)
        if value is None:
            return ()
        if isinstance(value, str):
            self._require_pattern(option, value)
            return value
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.refusal(option, value, "a regular expression or a list of names")
        return tuple(value)

    def layers(self, option: str) -> frozenset[int] | None:
        value = self.content.get(option)
        if value is None:
            return None
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(one, int) for one in found):
            raise self.refusal(option, value, "a layer's number or a list of them")
        return frozenset(found)

    def _require_pattern(self, option: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            wanted = f"no regular expression: {error}"
            raise self.refusal(option, pattern, wanted) from error


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    """As PEFT matches: a string is a regular expression of the whole name, others are its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:  # noqa: ANN401
    """The value of the first pattern that the end of the module's name matches."""
    found = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _layer_of(module: str) -> int | None:
    """The number in the module's name, which is its layer's."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)
