from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from services.common.settings import EMBEDDED_MODEL
from tests.models_in_code import save_byte_tokenizer
from winnow.errors import InvalidRequest, UnusableModel
from winnow.tokenizer import Tokenizer as WinnowTokenizer
from winnow.tokenizer import load_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> WinnowTokenizer:
    return load_tokenizer(folder)


def test_the_embedded_model_reads_letters_one_by_one() -> None:
    """Its folder says so; the Qwen2 tokenizer's own rules would merge some with a space."""
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    spelled = [tokenizer.decode([token]) for token in tokenizer.encode("VAR NPEIB = 12")]
    assert "".join(spelled) == "VAR NPEIB = 12"
    assert spelled[-9:] == ["N", "P", "E", "I", "B", " =", " ", "1", "2"]


@given(text=TEXTS)
def test_text_survives_encode_and_decode(tokenizer: WinnowTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(token_ids=st.lists(st.integers(0, 319), max_size=30))
def test_decodes_as_the_tokenizers_library_does(
    folder: Path, tokenizer: WinnowTokenizer, token_ids: list[int]
) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    theirs = backend.decode(token_ids, skip_special_tokens=False)
    assert tokenizer.decode(token_ids) == theirs


def test_token_bytes_of_a_half_character_and_of_an_unknown_id(tokenizer: WinnowTokenizer) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("🎉"))) == "🎉".encode()
    assert tokenizer.token_bytes(10**6) == b""


def test_chat_ends_where_the_answer_begins(tokenizer: WinnowTokenizer) -> None:
    token_ids = tokenizer.render_chat([{"role": "user", "content": "hé"}])
    assert tokenizer.decode(token_ids) == "<|user|>hé<|end|><|assistant|>"


def test_chat_without_template_is_refused(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequest, match="no chat template"):
        load_tokenizer(tmp_path).render_chat([{"role": "user", "content": "a"}])


def test_messages_that_the_template_refuses_are_an_invalid_request(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        load_tokenizer(tmp_path).render_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_an_unusable_model(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UnusableModel, match=r"tokenizer"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    backend = Backend(BPE({"a": 0}, []))
    backend.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(UnusableModel, match="WordPiece"):
        load_tokenizer(tmp_path)
