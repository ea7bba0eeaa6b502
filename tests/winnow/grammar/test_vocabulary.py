"""What llguidance is told of a vocabulary."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.models_in_code import VOCAB_SIZE, save_sentencepiece_tokenizer
from tests.winnow.grammar.walks import END
from winnow.grammar.vocabulary import Vocabulary, _TokenSource
from winnow.tokenizer import Tokenizer, load_tokenizer


def source(tokenizer: Tokenizer, control: Collection[int] = ()) -> _TokenSource:
    tokens = [tokenizer.token_bytes(idx) for idx in range(VOCAB_SIZE)]
    return _TokenSource(tokenizer, tokens, {*tokenizer.added_token_ids, *control}, END)


def spelled(own: _TokenSource, ids: list[int]) -> bytes:
    return b"".join(own.tokens[idx] for idx in ids)


@pytest.mark.parametrize("text", ["the quick brown fox", "é\n中", "", '{"lazy":'])
def test_forced_text_is_tokenized_as_the_model_reads_it(tokenizer: Tokenizer, text: str) -> None:
    assert source(tokenizer)(text.encode()) == tokenizer.encode(text)


@pytest.mark.parametrize("text", [b"a<|user|>b", b"\xe4\xb8", b"\xff\xfe", b"the \xe4"])
def test_text_that_the_tokenizer_reads_otherwise_is_spelled_out(
    tokenizer: Tokenizer, text: bytes
) -> None:
    own = source(tokenizer)
    ids = own(text)
    assert spelled(own, ids) == text
    assert set(ids).isdisjoint(tokenizer.added_token_ids)


def test_a_tokenizer_that_adds_a_space_is_not_believed(tmp_path: Path) -> None:
    save_sentencepiece_tokenizer(tmp_path)
    own = source(load_tokenizer(tmp_path))
    assert spelled(own, own(b"the quick\n")) == b"the quick\n"


def test_of_long_forced_text_the_beginning_is_enough(tokenizer: Tokenizer) -> None:
    own = source(tokenizer)
    assert spelled(own, own(b"the " * 1000)) == (b"the " * 1000)[:512]


def test_bytes_that_no_token_has_end_the_tokens(tokenizer: Tokenizer) -> None:
    own = source(tokenizer, control={*tokenizer.encode("\t")})
    assert spelled(own, own(b"a\tb")) == b"a"


def test_added_tokens_are_control_tokens_unless_they_are_mere_text(
    tiny_models: dict[str, Path],
) -> None:
    fast = PreTrainedTokenizerFast.from_pretrained(tiny_models["llama"])
    fast.add_tokens([AddedToken("ü"), AddedToken("\n\n"), AddedToken("<think>"), "[ARGS]"])
    fast.add_special_tokens({"additional_special_tokens": ["§"]})
    tokenizer = Tokenizer(fast)
    vocabulary = Vocabulary(tokenizer, VOCAB_SIZE + 8, frozenset({END}))
    control = {
        text for idx, text in tokenizer.added_token_ids.items() if vocabulary.is_control(idx)
    }
    assert control == {
        "<|end|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<think>",
        "[ARGS]",
        "§",
    }


def test_bit_i_of_a_mask_is_of_token_i(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer, 300, frozenset({END}))
    assert vocabulary.num_words == 10
    bits = vocabulary.bits([0, 33, 299])
    assert bits.dtype == np.int32
    assert bits.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1 << 11]
    assert vocabulary.bits([31]).tolist()[0] == -(2**31)
