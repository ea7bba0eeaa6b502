"""The served model without its weights: name, sizes, tokenizer and default settings."""

import logging
import time
from dataclasses import dataclass

from services.common.settings import Settings
from winnow import defaults
from winnow.distributed.heads import require_divides
from winnow.generation_defaults import GenerationDefaults, generation_defaults
from winnow.grammar.compiler import GrammarCompiler
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
        """Raises UnusableModel, or InvalidSetting for settings that do not fit it."""
        description = describe_model(
            settings.model_source, device=settings.device, **settings.load_options
        )
        for num_ranks in (settings.prefill_ranks, settings.decode_ranks):
            require_divides(num_ranks, description.shape)
        usual = defaults.pruning_defaults(description)
        pruning = defaults.override_for(usual, settings.pruning, description.shape)
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

    def new_grammar_compiler(self) -> GrammarCompiler:
        """For the model's tokens; the caller closes it."""
        description = self.description
        return GrammarCompiler(self.tokenizer, description.vocab_size, description.eos_token_ids)
