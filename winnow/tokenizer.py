"""Text to token ids and back."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from winnow.errors import InvalidRequest, UnusableModel
from winnow.model_files import first_line
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
    try:
        loader = PreTrainedTokenizerFast if _is_self_contained(Path(path)) else AutoTokenizer
        tokenizer = loader.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = first_line(error)
        raise UnusableModel(f"model folder {path} has no usable tokenizer: {reason}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UnusableModel(f"model folder {path} has no tokenizer.json")
    return Tokenizer(tokenizer)


def _is_self_contained(folder: Path) -> bool:
    """True if tokenizer.json is all there is to the tokenizer, by the folder's own word.

    AutoTokenizer goes by the model's type in spite of that, and splits text as that model does.
    """
    config = folder / "tokenizer_config.json"
    return config.exists() and json.loads(config.read_text()).get("tokenizer_class") == _BACKEND
