from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from training.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, VOCAB_SIZE


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


def test_renders_tools_calls_and_results(tokenizer: PreTrainedTokenizerFast) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    call = {"type": "function", "function": {"name": "now", "arguments": {"zone": "é"}}}
    chat: Any = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "noon"},
    ]
    text = tokenizer.apply_chat_template(
        chat, tools=[tool], tokenize=False, add_generation_prompt=True
    )
    written = '<tool_call>\n{"name": "now", "arguments": {"zone": "é"}}\n</tool_call>'
    listed = '{"type": "function", "function": {"name": "now", "parameters": {}}}'
    assert isinstance(text, str)
    assert f"<tools>\n{listed}\n</tools>" in text
    assert text.endswith(
        f"<|end|><|user|>hi<|end|><|assistant|>{written}\n{written}<|end|>"
        "<|user|><tool_response>\nnoon\n</tool_response><|end|><|assistant|>"
    )


def test_the_embedded_model_has_this_template() -> None:
    file = Path(__file__).parents[2] / "models" / "winnow-tiny" / "chat_template.jinja"
    assert file.read_text() == CHAT_TEMPLATE
