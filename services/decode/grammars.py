"""The decode worker's compiler of grammars, if its model has what that needs."""

import logging

from winnow.errors import InvalidGrammar, UnusableModel
from winnow.grammar.compiler import GrammarCompiler
from winnow.model_files import ModelDescription
from winnow.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


def load_grammar_compiler(model: ModelDescription) -> GrammarCompiler | None:
    """None, with a warning, if the model has no usable tokenizer, or no end token."""
    try:
        tokenizer = load_tokenizer(model.path)
        tokenizer.require_fits(model.vocab_size)
        compiler = GrammarCompiler(tokenizer, model.vocab_size, model.eos_token_ids)
        compiler.prepare()
    except (UnusableModel, InvalidGrammar) as error:
        logger.warning("requests with a grammar go to other workers: %s", error)
        return None
    return compiler
