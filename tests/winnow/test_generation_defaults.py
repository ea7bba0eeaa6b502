"""What the files of a model folder say about generating, and what they may not say."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from tests.models_in_code import SPECIAL_TOKENS, save_byte_tokenizer, save_tiny_model
from winnow.errors import InvalidSetting, UnusableModel
from winnow.generation_defaults import end_token_ids, generation_defaults
from winnow.model_files import describe_model

VOCAB_SIZE = 320


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Its tokenizer's eos_token is <|end|>, token 0."""
    save_byte_tokenizer(tmp_path)
    return tmp_path


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def test_end_tokens_of_all_three_files_count_together(folder: Path) -> None:
    assert end_token_ids(folder, None, VOCAB_SIZE) == {0}
    assert end_token_ids(folder, 5, VOCAB_SIZE) == {0, 5}
    change(folder / "generation_config.json", eos_token_id=[6, 7])
    assert end_token_ids(folder, [5, 6], VOCAB_SIZE) == {0, 5, 6, 7}
    change(folder / "generation_config.json", eos_token_id=None)
    assert end_token_ids(folder, 5, VOCAB_SIZE) == {0, 5}


def test_a_folder_without_any_has_none(tmp_path: Path) -> None:
    assert end_token_ids(tmp_path, None, VOCAB_SIZE) == frozenset()


def test_a_whole_folder_is_described_with_all_of_them(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, eos_token_id=9)
    change(path / "generation_config.json", eos_token_id=[8])
    change(path / "tokenizer_config.json", eos_token="<|user|>")
    assert describe_model(path).eos_token_ids == {9, 8, SPECIAL_TOKENS.index("<|user|>")}


@pytest.mark.parametrize("eos", ["<|user|>", {"content": "<|user|>", "special": True}])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_tokenizers_eos_is_found_wherever_it_is_named(
    folder: Path, eos: object, file: str
) -> None:
    change(folder / "tokenizer_config.json", eos_token=None)
    change(folder / file, eos_token=eos)
    assert end_token_ids(folder, None, VOCAB_SIZE) == {SPECIAL_TOKENS.index("<|user|>")}


def test_the_tokenizers_eos_may_be_an_ordinary_token(folder: Path) -> None:
    change(folder / "tokenizer_config.json", eos_token="Ġthe")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert end_token_ids(folder, None, VOCAB_SIZE) == {vocabulary["Ġthe"]}


def test_the_tokenizers_eos_is_found_in_a_list_of_pieces(tmp_path: Path) -> None:
    backend = Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0), ("</s>", -2.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    change(tmp_path / "tokenizer_config.json", eos_token="</s>")
    assert end_token_ids(tmp_path, None, 3) == {2}


def test_the_tokenizers_eos_is_found_without_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    added = {"7": {"content": "<|im_end|>", "special": True}}
    change(folder / "tokenizer_config.json", eos_token="<|im_end|>", added_tokens_decoder=added)
    assert end_token_ids(folder, None, VOCAB_SIZE) == {7}


@pytest.mark.parametrize("eos", [-1, 320, [0, 10**9]])
def test_an_end_token_that_the_model_does_not_have_is_left_out_with_a_warning(
    folder: Path, eos: object, caplog: pytest.LogCaptureFixture
) -> None:
    change(folder / "generation_config.json", eos_token_id=eos)
    with caplog.at_level(logging.WARNING):
        assert end_token_ids(folder, 5, VOCAB_SIZE) == {0, 5}
    assert "generation_config.json" in caplog.text


def test_an_eos_token_that_the_tokenizer_does_not_have_is_left_out_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(folder / "tokenizer_config.json", eos_token="<|nowhere|>")
    assert end_token_ids(folder, 5, VOCAB_SIZE) == {5}
    assert "<|nowhere|>" in caplog.text


@pytest.mark.parametrize("eos", ["0", 1.5, True, {"id": 0}, [0, None], [[0]]])
def test_an_end_token_of_another_kind_is_an_unusable_model(folder: Path, eos: object) -> None:
    change(folder / "generation_config.json", eos_token_id=eos)
    with pytest.raises(UnusableModel, match=r"generation_config\.json: eos_token_id is"):
        end_token_ids(folder, 5, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generation_config.json", "{"),
        ("generation_config.json", "[]"),
        ("tokenizer_config.json", "\xff"),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"eos_token": "x", "added_tokens_decoder": [1]}'),
        ("tokenizer.json", '{"added_tokens": [{"id": 0}]}'),
        ("tokenizer.json", '{"model": {"vocab": 5}}'),
    ],
)
def test_a_broken_file_is_an_unusable_model(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content, encoding="latin-1")
    with pytest.raises(UnusableModel) as error:
        end_token_ids(folder, 5, VOCAB_SIZE)
    assert str(folder) in error.value.message
    assert "\n" not in error.value.message


def test_defaults_of_sampling_are_the_generation_configs(tmp_path: Path) -> None:
    given = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
    }
    others = {"do_sample": False, "max_new_tokens": 99, "num_beams": 4, "eos_token_id": 1}
    change(tmp_path / "generation_config.json", **given, **others)
    defaults = generation_defaults("auto", tmp_path)
    assert defaults.sampling == given
    assert defaults.told() == given | {"max_tokens": 99}


def test_without_a_generation_config_they_are_openais(tmp_path: Path) -> None:
    told = generation_defaults("auto", tmp_path).told()
    assert told == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": None,
    }
    change(tmp_path / "generation_config.json", temperature=None, top_k=-1)
    assert generation_defaults("auto", tmp_path).told() == told


@pytest.mark.parametrize("word", ["none", "vllm"])
def test_an_operator_may_want_none_or_another_folders(tmp_path: Path, word: str) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    for folder, temperature in ((model, 0.5), (other, 0.7)):
        folder.mkdir()
        change(folder / "generation_config.json", temperature=temperature)
    assert generation_defaults(word, model).sampling == {}
    assert generation_defaults(str(other), model).sampling == {"temperature": 0.7}


def test_a_folder_without_generation_config_is_refused(tmp_path: Path) -> None:
    for setting in (str(tmp_path), "atuo"):
        with pytest.raises(InvalidSetting, match="it must be auto, none, or a folder with"):
            generation_defaults(setting, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": "0.6"}, "temperature is '0.6'; it must be a number"),
        ({"temperature": True}, "temperature is True; it must be a number"),
        ({"temperature": -1}, "temperature is -1; the allowed range is"),
        ({"temperature": 3}, "temperature is 3; the allowed range is"),
        ({"top_p": 0}, "top_p is 0; the allowed range is"),
        ({"top_p": [0.5]}, "top_p is"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"top_k": -2}, "top_k is -2; the allowed range is"),
        ({"min_p": 2}, "min_p is 2; the allowed range is"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; the allowed range is"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many'; it must be a whole number"),
    ],
)
def test_a_default_that_cannot_be_used_is_an_unusable_model(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    change(tmp_path / "generation_config.json", **values)
    with pytest.raises(UnusableModel, match=r"generation_config\.json: ") as error:
        generation_defaults("auto", tmp_path)
    assert message in error.value.message
