"""Text to token ids and back, also while the ids are still being generated.

`TextStream` is what a generation loop needs: it turns ids into text that never shows half a
character and ends before a stop string, wherever token boundaries fall.
"""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from winnow.errors import InvalidRequest, UnusableModel
from winnow.folder_errors import as_unusable
from winnow.token_bytes import byte_reader

_BACKEND = "TokenizersBackend"  # what transformers calls a tokenizer without code of its own


class Tokenizer:
    """A model's vocabulary and chat template. Stateless between calls, usable from any thread."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401 - transformers' base is untyped
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._read_bytes = byte_reader(self._backend)
        added = self._backend.get_added_tokens_decoder()
        self._added: dict[int, bytes] = {i: token.content.encode() for i, token in added.items()}
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with the tokens that the model wants around a prompt, if any."""
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids  # type: ignore[no-any-return]

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        ids = (i for i in token_ids if not (skip_special_tokens and self.is_special(i)))
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be part of a character; empty for an unknown id."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._find_bytes(token_id)
        return self._bytes[token_id]

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._read_bytes(token)

    def require_fits(self, vocab_size: int) -> None:
        """Raise UnusableModel if ordinary text has tokens that a model of `vocab_size` lacks.

        Tokens that were added to the vocabulary may lie beyond it; nobody has to use them.
        """
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        highest = max(set(vocabulary.values()) - self._added.keys(), default=-1)
        if highest >= vocab_size:
            raise UnusableModel(
                f"the tokenizer is not this model's: it has tokens up to {highest}; the model has "
                f"{vocab_size}, up to {vocab_size - 1}"
            )

    def is_special(self, token_id: int) -> bool:
        """True for control tokens, which are no part of an answer's text."""
        return token_id in self._special

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation; see `chat_text`."""
        return self.encode(self.chat_text(messages), add_special_tokens=False)

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation by the chat template, up to where the assistant's answer begins.

        messages: each with `role` and `content`.
        Raises InvalidRequest if the model has no chat template, or its template refuses them.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest(
                "the model has no chat template; use text completions", param="messages"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses the messages: {error}", param="messages"
            ) from error
        return text


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder; raises UnusableModel if there is none that works."""
    with as_unusable(f"model folder {path} has no usable tokenizer"):
        loader = PreTrainedTokenizerFast if _is_self_contained(Path(path)) else AutoTokenizer
        tokenizer = loader.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise UnusableModel(f"model folder {path} has no tokenizer.json")
        return Tokenizer(tokenizer)


def _is_self_contained(folder: Path) -> bool:
    """True if tokenizer.json is all there is to the tokenizer, by the folder's own word.

    AutoTokenizer goes by the model's type in spite of that, and splits text as that model does.
    """
    config = folder / "tokenizer_config.json"
    return config.exists() and json.loads(config.read_text()).get("tokenizer_class") == _BACKEND


class IncrementalDetokenizer:
    """Token ids to text as they come; an incomplete character waits for its other bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The characters that this token completes; control tokens give none.

        Bytes that can never become UTF-8 give U+FFFD as soon as that is certain.
        """
        if self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))


class StopMatcher:
    """Cuts text before the stop string that is complete first, however the text is split.

    Of several that end at the same character the one that begins first cuts.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What is certainly before any stop string; the rest is held back, or dropped at a stop."""
        if self.stopped:
            return ""
        text = self._held + text
        end = self._first_match(text)
        if end is None:
            end = len(text) - self._num_possible(text)
        self._held = text[end:]
        return text[:end]

    def finish(self) -> str:
        """What is still held back, when no more text will come."""
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _first_match(self, text: str) -> int | None:
        """Where the stop string that is complete first begins; notes that it was met."""
        found = ((text.find(stop), len(stop)) for stop in self._stop)
        matches = [(start + length, start) for start, length in found if start >= 0]
        self.stopped = bool(matches)
        return min(matches)[1] if matches else None

    def _num_possible(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return len(text) - start
        return 0


class TextStream:
    """The text of one answer while its tokens are generated."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._matcher = StopMatcher(stop)

    @property
    def stopped(self) -> bool:
        """True once a stop string was met; what comes after it is not part of the answer."""
        return self._matcher.stopped

    def feed(self, token_id: int) -> str:
        """The text that is certain after this token; may be empty."""
        return self._matcher.feed(self._detokenizer.feed(token_id))

    def finish(self) -> str:
        """The rest of the text when no more tokens come; an incomplete character is left out."""
        return self._matcher.finish()
