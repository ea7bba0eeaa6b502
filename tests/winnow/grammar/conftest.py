from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models_in_code import VOCAB_SIZE
from tests.winnow.grammar.walks import END
from winnow.grammar.compiler import GrammarCompiler
from winnow.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="package")
def tokenizer(tiny_models: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(tiny_models["llama"])


@pytest.fixture(scope="package")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, frozenset({END}))
    yield compiler
    compiler.close()
