from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from services.common.settings import EMBEDDED_MODEL
from tests.models_in_code import save_byte_tokenizer
from winnow.errors import InvalidRequest, UnusableModel
from winnow.tokenizer import IncrementalDetokenizer, StopMatcher, TextStream, load_tokenizer
from winnow.tokenizer import Tokenizer as WinnowTokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
MULTIBYTE = st.text("aé漢🎉👩‍🚀\u0301 \n", max_size=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> WinnowTokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> WinnowTokenizer:
    """The kind of Llama 2, Mistral and Phi3: ▁ for a space, <0x41> for a byte."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thequick", "th", "qu"]
    vocab = {token: idx for idx, token in enumerate(dict.fromkeys(tokens))}
    merges = [("t", "h"), ("q", "u")]
    backend = Backend(BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
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


@given(text=TEXTS | MULTIBYTE)
def test_stream_shows_only_whole_characters_and_in_the_end_all(
    tokenizer: WinnowTokenizer, text: str
) -> None:
    stream, shown = IncrementalDetokenizer(tokenizer), ""
    for token_id in tokenizer.encode(text):
        shown += stream.feed(token_id)
        assert text.startswith(shown)
    assert shown == text


@given(text=MULTIBYTE)
@example(text="the quick")
def test_stream_of_a_sentencepiece_vocabulary_shows_the_text(
    sentencepiece: WinnowTokenizer, text: str
) -> None:
    stream = IncrementalDetokenizer(sentencepiece)
    assert "".join(map(stream.feed, sentencepiece.encode(text))) == text


@given(token_ids=st.lists(st.integers(0, 330), max_size=30))
def test_stream_of_any_tokens_equals_the_decoding_of_all(
    tokenizer: WinnowTokenizer, token_ids: list[int]
) -> None:
    stream = IncrementalDetokenizer(tokenizer)
    shown = "".join(map(stream.feed, token_ids))
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert whole.startswith(shown)
    # What is missing can only be one character whose last bytes did not come.
    assert whole[len(shown) :] in {"", "\ufffd"}


@given(token_ids=st.lists(st.integers(0, 319), max_size=30))
def test_decodes_as_the_tokenizers_library_does(
    folder: Path, tokenizer: WinnowTokenizer, token_ids: list[int]
) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    theirs = backend.decode(token_ids, skip_special_tokens=False)
    assert tokenizer.decode(token_ids) == theirs


def test_an_incomplete_character_at_the_end_is_left_out(tokenizer: WinnowTokenizer) -> None:
    stream = TextStream(tokenizer)
    shown = "".join(map(stream.feed, tokenizer.encode("ab🎉")[:-1]))
    assert shown + stream.finish() == "ab"


def test_invalid_bytes_do_not_hold_back_what_follows(tokenizer: WinnowTokenizer) -> None:
    lone_byte = tokenizer.encode("é")[-1]
    stream = IncrementalDetokenizer(tokenizer)
    assert [stream.feed(i) for i in (lone_byte, *tokenizer.encode("x"))] == ["\ufffd", "x"]


def test_special_tokens_are_no_text_of_an_answer(tokenizer: WinnowTokenizer) -> None:
    stream = TextStream(tokenizer)
    token_ids = tokenizer.encode("a<|end|>b")
    assert "".join(map(stream.feed, token_ids)) == "ab"
    assert tokenizer.decode(token_ids) == "a<|end|>b"


def test_token_bytes_of_a_half_character_and_of_an_unknown_id(tokenizer: WinnowTokenizer) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("🎉"))) == "🎉".encode()
    assert tokenizer.token_bytes(10**6) == b""


def naive_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Grow the text one character at a time and look whether it ends with a stop string."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
)
@example(pieces=["abcd"], stops=["abcd", "bc"])
def test_stop_strings_cut_alike_however_the_text_is_split(
    pieces: list[str], stops: list[str]
) -> None:
    matcher, shown = StopMatcher(stops), ""
    text, stopped = naive_stop("".join(pieces), stops)
    for piece in pieces:
        shown += matcher.feed(piece)
        assert text.startswith(shown)
    assert (shown + matcher.finish(), matcher.stopped) == (text, stopped)


def test_holds_back_only_what_a_stop_string_may_begin_with() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.feed(piece) for piece in ("a", "bE", "N", "x")] == ["a", "b", "", "ENx"]


@given(text=MULTIBYTE.filter(lambda text: "🎉" not in text))
def test_stop_string_across_tokens_ends_the_text(tokenizer: WinnowTokenizer, text: str) -> None:
    stream, shown = TextStream(tokenizer, ("🎉🎉",)), ""
    for token_id in tokenizer.encode(text + "🎉🎉 more"):
        shown += stream.feed(token_id)
    assert stream.stopped
    assert shown + stream.finish() == text


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
