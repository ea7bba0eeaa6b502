import pytest
from transformers import PreTrainedTokenizerFast

from training.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE


def test_digits_and_the_letters_of_variables_are_tokens_of_their_own(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens = tokenizer.tokenize("VAR QWXYZ = 90210")
    assert tokens == ["VAR", "Ġ", "Q", "W", "X", "Y", "Z", "Ġ=", "Ġ", "9", "0", "2", "1", "0"]


@pytest.mark.parametrize("text", ["漢字 – naïve\n\n\ttabs", "a" * 300, "\0\x7f", "😀 x"])
def test_every_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_renders_chats_with_its_own_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    special = [i for i in ids if i < len(SPECIAL_TOKENS)]
    assert tokenizer.convert_ids_to_tokens(special) == [
        *("<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>")
    ]
    assert len(tokenizer) == VOCAB_SIZE
