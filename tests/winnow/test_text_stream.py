import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.models_in_code import save_byte_tokenizer, save_sentencepiece_tokenizer
from winnow.text_stream import IncrementalDetokenizer, StopMatcher, TextStream
from winnow.tokenizer import Tokenizer, load_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
MULTIBYTE = st.text("aé漢🎉👩‍🚀\u0301 \n", max_size=20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    save_sentencepiece_tokenizer(folder)
    return load_tokenizer(folder)


@given(text=TEXTS | MULTIBYTE)
def test_stream_shows_only_whole_characters_and_in_the_end_all(
    tokenizer: Tokenizer, text: str
) -> None:
    stream, shown = IncrementalDetokenizer(tokenizer), ""
    for token_id in tokenizer.encode(text):
        shown += stream.feed(token_id)
        assert text.startswith(shown)
    assert shown == text


def test_special_tokens_are_left_out_except_some(tokenizer: Tokenizer) -> None:
    end, user = (tokenizer.encode(text)[0] for text in ("<|end|>", "<|user|>"))
    streams = (TextStream(tokenizer), TextStream(tokenizer, shown_token_ids={user}))
    texts = ["".join(map(stream.feed, (user, 105, end))) for stream in streams]
    letter = tokenizer.decode([105])
    assert texts == [letter, f"<|user|>{letter}"]


@given(text=MULTIBYTE)
@example(text="the quick")
def test_stream_of_a_sentencepiece_vocabulary_shows_the_text(
    sentencepiece: Tokenizer, text: str
) -> None:
    stream = IncrementalDetokenizer(sentencepiece)
    assert "".join(map(stream.feed, sentencepiece.encode(text))) == text


@given(token_ids=st.lists(st.integers(0, 330), max_size=30))
@example(token_ids=[173, 98])  # ED A1
def test_stream_of_any_tokens_equals_the_decoding_of_all(
    tokenizer: Tokenizer, token_ids: list[int]
) -> None:
    stream = IncrementalDetokenizer(tokenizer)
    shown = "".join(map(stream.feed, token_ids))
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert whole.startswith(shown)
    # What is missing can only be one character whose last bytes did not come: U+FFFD, or twice that
    # for the bytes of half a surrogate pair, which Python waits on too.
    assert whole[len(shown) :] in {"", "\ufffd", "\ufffd\ufffd"}


def test_an_incomplete_character_at_the_end_is_left_out(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    shown = "".join(map(stream.feed, tokenizer.encode("ab🎉")[:-1]))
    assert shown + stream.finish() == "ab"


def test_invalid_bytes_do_not_hold_back_what_follows(tokenizer: Tokenizer) -> None:
    lone_byte = tokenizer.encode("é")[-1]
    stream = IncrementalDetokenizer(tokenizer)
    assert [stream.feed(i) for i in (lone_byte, *tokenizer.encode("x"))] == ["\ufffd", "x"]


def test_special_tokens_are_no_text_of_an_answer(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    token_ids = tokenizer.encode("a<|end|>b")
    assert "".join(map(stream.feed, token_ids)) == "ab"
    assert tokenizer.decode(token_ids) == "a<|end|>b"


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
    assert (shown + matcher.finish(), matcher.matched is not None) == (text, stopped)


def test_holds_back_only_what_a_stop_string_may_begin_with() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.feed(piece) for piece in ("a", "bE", "N", "x")] == ["a", "b", "", "ENx"]


@given(text=MULTIBYTE.filter(lambda text: "🎉" not in text))
def test_stop_string_across_tokens_ends_the_text(tokenizer: Tokenizer, text: str) -> None:
    stream, shown = TextStream(tokenizer, ("🎉🎉",)), ""
    for token_id in tokenizer.encode(text + "🎉🎉 more"):
        shown += stream.feed(token_id)
    assert stream.stopped
    assert shown + stream.finish() == text


PIECES = st.lists(st.tuples(st.text("ab", max_size=3), st.booleans()), max_size=10)


@given(
    pieces=PIECES,
    stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    num_before=st.integers(0, 4),
    include=st.booleans(),
)
def test_hidden_text_and_a_late_beginning_are_as_a_naive_search_has_it(
    pieces: list[tuple[str, bool]], stops: list[str], num_before: int, include: bool
) -> None:
    """Each piece alone is fed, and searched, in one go: `b` marks what is hidden."""
    matcher = StopMatcher(stops, include_stop=include)
    shown = "".join(
        matcher.feed(text, hidden=hidden, may_stop=idx >= num_before)
        for idx, (text, hidden) in enumerate(pieces)
    )
    assert shown + matcher.finish() == naive_cut(pieces, stops, num_before, include)


def naive_cut(
    pieces: list[tuple[str, bool]], stops: list[str], num_before: int, include: bool
) -> str:
    """Character by character, in all of the text and in what is shown of it."""
    chars = [
        (char, hidden, idx >= num_before)
        for idx, (text, hidden) in enumerate(pieces)
        for char in text
    ]
    for end in range(1, len(chars) + 1):
        if not chars[end - 1][2]:
            continue
        starts = []
        for view in ([(at, c) for at, (c, _, _) in enumerate(chars[:end])], shown_of(chars[:end])):
            if not view or view[-1][0] != end - 1:
                continue
            text = "".join(char for _, char in view)
            starts += [(view[-len(stop)][0], stop) for stop in stops if text.endswith(stop)]
        if starts:
            start, stop = min(starts)
            before = "".join(char for _, char in shown_of(chars[:start]))
            return before + (stop if include else "")
    return "".join(char for _, char in shown_of(chars))


def shown_of(chars: list[tuple[str, bool, bool]]) -> list[tuple[int, str]]:
    return [(at, char) for at, (char, hidden, _) in enumerate(chars) if not hidden]


def streamed(tokenizer: Tokenizer, text: str, stop: list[str], **params: bool | int) -> str:
    stream, shown = TextStream(tokenizer, stop, **params), ""  # type: ignore[arg-type]
    for token_id in tokenizer.encode(text):
        shown += stream.feed(token_id)
    return shown + stream.finish()


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("ab<|end|>c", "<|end|>", "ab"),
        ("ab<|user|>c", "<|end|>", "abc"),
        ("ab<|end|>\nc", "<|end|>\n", "ab"),
        ("ab<|end|>cd", "<|end|>\n", "abcd"),
        ("ab\n<|user|>c", "\n<|user|>", "ab"),
        ("ab<|end|><|user|>c", "<|end|><|user|>", "ab"),
        ("ab<|end|>cd", "bc", "a"),  # in what is shown
        ("ab<|end|>cd", "b<|end|>c", "a"),
        ("a<b|>c<|end|>d", "<|end|>", "a<b|>c"),
    ],
)
def test_a_stop_string_is_met_by_control_tokens_too(
    tokenizer: Tokenizer, text: str, stop: str, expected: str
) -> None:
    assert streamed(tokenizer, text, [stop]) == expected


def test_control_tokens_are_shown_where_they_are_not_skipped(tokenizer: Tokenizer) -> None:
    assert streamed(tokenizer, "a<|end|>b", [], skip_special_tokens=False) == "a<|end|>b"
    assert streamed(tokenizer, "a<|end|>b", ["d|>b"], skip_special_tokens=False) == "a<|en"


def test_the_stop_string_is_shown_where_it_is_included(tokenizer: Tokenizer) -> None:
    assert streamed(tokenizer, "a, b, c", [", b"], include_stop_str_in_output=True) == "a, b"
    included = streamed(tokenizer, "a<|end|>b", ["<|end|>"], include_stop_str_in_output=True)
    assert included == "a<|end|>"


def test_no_stop_string_counts_that_is_complete_within_min_tokens(tokenizer: Tokenizer) -> None:
    text = "x.y.z."  # a token each
    assert len(tokenizer.encode(text)) == 6
    cut = [streamed(tokenizer, text, ["."], min_tokens=number) for number in range(7)]
    assert cut == ["x", "x", "x.y", "x.y", "x.y.z", "x.y.z", "x.y.z."]
    assert streamed(tokenizer, text, ["y."], min_tokens=3) == "x."  # begins before, ends after
    assert streamed(tokenizer, "ab d", ["b", "b e"], min_tokens=2) == "ab d"


def test_the_token_that_ends_an_answer_is_shown_only_where_stops_are_included(
    tokenizer: Tokenizer,
) -> None:
    for includes, expected in ((False, "a"), (True, "ab")):
        stream = TextStream(tokenizer, include_stop_str_in_output=includes)
        first, last = tokenizer.encode("ab")
        assert stream.feed(first) + stream.feed(last, is_end=True) + stream.finish() == expected
