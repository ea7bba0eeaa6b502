"""The served model without its weights: name, sizes, tokenizer and default settings."""

import logging
import time
from dataclasses import dataclass

from services.common.settings import Settings
from winnow import defaults
from winnow.generation_defaults import GenerationDefaults, generation_defaults
from winnow.model_files import ModelDescription, describe_model
from winnow.pruning_settings import PruningSettings
from winnow.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """pruning, generation: the defaults of requests. created_s: Unix time."""

    name: str
    description: ModelDescription
    tokenizer: Tokenizer
    pruning: PruningSettings
    generation: GenerationDefaults
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
        pruning = defaults.override(defaults.pruning_defaults(description), settings.pruning)
        pruning.require_fits(description.shape.num_layers)
        generation = generation_defaults(settings.generation_config, description.path)
        logger.info("requests that do not say otherwise get %s", generation.told())
        tokenizer = load_tokenizer(
            description.path,
            chat_template_kwargs=settings.chat_template_kwargs,
            allow_special_tokens=settings.allow_special_tokens,
        )
        tokenizer.require_fits(description.vocab_size)
        return cls(
            name=settings.served_name,
            description=description,
            tokenizer=tokenizer,
            pruning=pruning,
            generation=generation,
            created_s=int(time.time()),
        )
