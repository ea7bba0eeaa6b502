"""The model as the gateway knows it: name, sizes, vocabulary, settings, but no weights."""

import time
from dataclasses import dataclass

from services.common.settings import Settings
from winnow import defaults
from winnow.model_files import ModelDescription, describe_model
from winnow.request import PruningSettings
from winnow.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """pruning: what a request gets that asks for nothing else. created_s: Unix time."""

    name: str
    description: ModelDescription
    tokenizer: Tokenizer
    pruning: PruningSettings
    created_s: int

    @classmethod
    def load(cls, settings: Settings) -> "ServedModel":
        """Raises UnusableModel, or InvalidSetting for pruning settings that do not fit it."""
        description = describe_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
        )
        num_layers = description.shape.num_layers
        pruning = defaults.pruning_defaults(description.path, num_layers)
        pruning = defaults.override(pruning, settings.pruning)
        pruning.require_fits(num_layers)
        tokenizer = load_tokenizer(description.path)
        tokenizer.require_fits(description.vocab_size)
        return cls(
            name=settings.served_name,
            description=description,
            tokenizer=tokenizer,
            pruning=pruning,
            created_s=int(time.time()),
        )
