"""Where tokens begin in a text."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.models_in_code import save_byte_tokenizer
from winnow.tokenizer import Tokenizer, load_tokenizer

TEXTS = st.text("the quick aé漢🎉👩‍🚀\u0301 \n", max_size=30)


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    save_byte_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def framed(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's kind: a ▁ before the text, and special tokens around it."""
    vocab = {token: idx for idx, token in enumerate(["<s>", "</s>", "<unk>", *"▁theqick"])}
    backend = Backend(BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    folder: Path = tmp_path_factory.mktemp("framed")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(folder)
    return load_tokenizer(folder)


@given(text=TEXTS)
def test_every_whole_token_of_a_text_is_where_it_is_said_to_be(
    bytes_tokenizer: Tokenizer, text: str
) -> None:
    token_ids = bytes_tokenizer.encode(text)
    for offsets in (bytes_tokenizer.offsets(token_ids, text), bytes_tokenizer.offsets(token_ids)):
        assert len(offsets) == len(token_ids)
        assert offsets == sorted(offsets)
        for token_id, offset in zip(token_ids, offsets, strict=True):
            piece = bytes_tokenizer.token_bytes(token_id).decode(errors="ignore")
            if piece.encode() == bytes_tokenizer.token_bytes(token_id):
                assert text.startswith(piece, offset)


def test_tokens_around_the_text_take_no_room_in_it(framed: Tokenizer) -> None:
    text = "the quick"
    token_ids = framed.encode(text)
    assert token_ids[0] == 0 and token_ids[-1] == 1
    offsets = framed.offsets(token_ids, text)
    assert (offsets[0], offsets[-1]) == (0, len(text))
    assert [text[offset] for offset in offsets[2:5]] == list("the")


def test_given_ids_are_placed_in_what_they_decode_to(bytes_tokenizer: Tokenizer) -> None:
    token_ids = [1, *bytes_tokenizer.encode("fox"), 0]
    offsets = bytes_tokenizer.offsets(token_ids)
    decoded = bytes_tokenizer.decode(token_ids)
    assert decoded == "<|system|>fox<|end|>"
    assert [decoded[i:j] for i, j in zip(offsets, [*offsets[1:], None], strict=True)] == [
        "<|system|>",
        *(bytes_tokenizer.decode([i]) for i in token_ids[1:-1]),
        "<|end|>",
    ]


def test_ids_that_the_text_is_not_split_into_are_placed_by_what_they_decode_to(
    bytes_tokenizer: Tokenizer,
) -> None:
    letters = [i for letter in "the" for i in bytes_tokenizer.encode(letter)]
    assert bytes_tokenizer.offsets(letters, "the") == [0, 1, 2]
