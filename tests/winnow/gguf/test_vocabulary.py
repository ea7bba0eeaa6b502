"""Tokens, chat templates, end tokens and sampling as a GGUF file states them."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.gguf_in_code import write_gguf
from tests.models_in_code import save_sentencepiece_tokenizer, save_tiny_model
from winnow.errors import InvalidRequest, UnusableModel
from winnow.generation_defaults import generation_defaults
from winnow.model_files import describe_model
from winnow.tokenizer import Tokenizer, load_tokenizer

TEXT = "the quick  brown\nfox's 12345 <|user|>é"
CHAT = [{"role": "user", "content": "the quick"}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def written(file: Path, folder: Path, **values: Any) -> Tokenizer:
    return load_tokenizer(write_gguf(file, folder, **values))


def test_text_is_split_and_joined_as_by_the_folders_tokenizer(
    file: Path, tiny_models: dict[str, Path]
) -> None:
    ours, theirs = written(file, tiny_models["llama"]), load_tokenizer(tiny_models["llama"])
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.chat_text(CHAT) == theirs.chat_text(CHAT)
    assert ours.control_token_ids == theirs.control_token_ids
    assert max(ours.encode("<|endoftext|><s></s><unk>")) < 320  # what others' vocabularies have


@pytest.mark.parametrize("adds_space", [True, False])
def test_sentencepiece_vocabularies_have_their_space(
    file: Path, tmp_path: Path, adds_space: bool
) -> None:
    folder = save_tiny_model(tmp_path / "folder", "llama")
    save_sentencepiece_tokenizer(folder)
    types = [2] + [6] * 256 + [1] * 63
    tokenizer = written(
        file,
        folder,
        tokenizer__ggml__add_space_prefix=adds_space,
        tokenizer__ggml__token_type=types,
    )
    plain = load_tokenizer(folder)
    assert max(tokenizer.encode("<|endoftext|><s></s>")) < 320
    assert tokenizer.encode("the quick") == plain.encode((" " if adds_space else "") + "the quick")
    assert tokenizer.decode(plain.encode("the é")) == "the é"


@pytest.mark.parametrize("add", [True, False, None])
def test_a_prompt_begins_as_the_file_says(
    file: Path, tiny_models: dict[str, Path], add: bool | None
) -> None:
    values = {} if add is None else {"tokenizer__ggml__add_bos_token": add}
    leave_out = ("tokenizer.ggml.add_bos_token",) if add is None else ()
    tokenizer = written(
        file, tiny_models["llama"], tokenizer__ggml__bos_token_id=1, leave_out=leave_out, **values
    )
    assert (tokenizer.encode("the")[0] == 1) is bool(add)


def test_words_of_llama_3_are_tokens_though_no_merge_makes_them(
    file: Path, tiny_models: dict[str, Path]
) -> None:
    """And a prompt begins with its first token, where the file does not say."""
    tokenizer = written(
        file,
        tiny_models["llama"],
        tokenizer__ggml__pre="llama-bpe",
        tokenizer__ggml__merges=["h e"],
        tokenizer__ggml__bos_token_id=1,
        leave_out=("tokenizer.ggml.add_bos_token",),
    )
    first, *rest = tokenizer.encode(" the")
    assert first == 1 and tokenizer.decode(rest) == " the" and len(rest) == 1


@pytest.mark.parametrize("name", ["smollm", "starcoder"])
def test_digits_stand_alone_where_the_model_was_trained_so(
    file: Path, tiny_models: dict[str, Path], name: str
) -> None:
    tokenizer = written(file, tiny_models["llama"], tokenizer__ggml__pre=name)
    splits = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(False)]
    )
    expected = [piece for piece, _ in splits.pre_tokenize_str("a 12 b")]
    backend = tokenizer._backend
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a 12 b")] == expected


def test_a_file_without_a_word_for_its_splits_is_split_as_gpt_2s(
    file: Path, tiny_models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = written(file, tiny_models["llama"], leave_out=("tokenizer.ggml.pre",))
    assert tokenizer.encode(TEXT) == load_tokenizer(tiny_models["llama"]).encode(TEXT)
    assert "does not say how its text is split" in caplog.text


def test_the_folder_beside_a_file_has_no_say(file: Path, tiny_models: dict[str, Path]) -> None:
    """llama.cpp's converter writes into the folder that it converts."""
    write_gguf(file, tiny_models["llama"], tokenizer__chat_template="{{ messages[0].content }}!")
    other = PreTrainedTokenizerFast.from_pretrained(tiny_models["llama"])
    other.chat_template = "not this one"
    other.save_pretrained(file.parent)
    (file.parent / "config.json").write_text('{"model_type": "bert"}')
    assert load_tokenizer(file).chat_text(CHAT) == "the quick!"
    assert describe_model(file).vocab_size == 320


def test_a_file_without_a_template_takes_no_chat(file: Path, tiny_models: dict[str, Path]) -> None:
    tokenizer = written(file, tiny_models["llama"], leave_out=("tokenizer.chat_template",))
    with pytest.raises(InvalidRequest, match="the model has no chat template"):
        tokenizer.chat_text(CHAT)


def test_of_several_templates_the_one_without_a_name_is_taken(
    file: Path, tiny_models: dict[str, Path]
) -> None:
    values = {
        "tokenizer__chat_templates": ["tool_use"],
        "tokenizer__chat_template": "D",
        "tokenizer__chat_template__tool_use": "T",
    }
    values = {name.replace("chat__template", "chat_template"): v for name, v in values.items()}
    assert written(file, tiny_models["llama"], **values).chat_text(CHAT) == "D"


def test_answers_end_at_every_token_that_ends_a_turn(
    file: Path, tiny_models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """<|end|> is 0, a control token; Phi-3's files name another one alone."""
    folder = tiny_models["llama"]
    write_gguf(file, folder, tokenizer__ggml__eos_token_id=7)
    assert describe_model(file).eos_token_ids == {0, 7}
    write_gguf(file, folder, tokenizer__ggml__eot_token_id=9, tokenizer__ggml__eos_token_id=999)
    assert describe_model(file).eos_token_ids == {0, 9}
    assert "end tokens [999] are not in the vocabulary" in caplog.text


def test_sampling_is_what_the_makers_recommend(file: Path, tiny_models: dict[str, Path]) -> None:
    write_gguf(file, tiny_models["llama"], general__sampling__temp=0.5, general__sampling__top_k=9)
    assert generation_defaults("auto", file).sampling == {"temperature": 0.5, "top_k": 9}
    assert generation_defaults("none", file).sampling == {}
    write_gguf(file, tiny_models["llama"], general__sampling__temp=-1.0)
    with pytest.raises(UnusableModel, match="temperature"):
        generation_defaults("auto", file)


def test_settings_beside_the_file_are_the_models(file: Path, tiny_models: dict[str, Path]) -> None:
    from winnow import Winnow

    write_gguf(file, tiny_models["llama"])
    (file.parent / "winnow.json").write_text('{"window_size": 5}')
    assert Winnow.load(file).pruning.window_size == 5
