"""The tokenizer: text and conversations to token ids, and back."""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from winnow.chat_template import ChatOptions, ChatTemplate
from winnow.control_tokens import MarkedEncoder, template_tokens
from winnow.errors import InvalidRequest, UnusableModel
from winnow.folder_errors import as_unusable
from winnow.gguf.header import read_header
from winnow.gguf.tokenizer import gguf_tokenizer
from winnow.marked_text import MarkedText
from winnow.token_bytes import byte_reader
from winnow.tool_support import Message, Tool

_PLAIN_CHAT = ChatOptions()
_BACKEND = "TokenizersBackend"  # transformers' class for tokenizers without their own code


class Tokenizer:
    """A model's vocabulary and chat template. Stateless between calls, thread-safe.

    chat_template_kwargs: default template variables; a conversation's override them.
    allow_special_tokens: allow control tokens in the messages of a conversation.
    """

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401 - transformers' base is untyped
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_special_tokens: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = _chat_template(
            tokenizer, chat_template_kwargs or {}, allow_special_tokens=allow_special_tokens
        )
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._read_bytes = byte_reader(self._backend)
        added = self._backend.get_added_tokens_decoder()
        self._added: dict[int, bytes] = {i: token.content.encode() for i, token in added.items()}
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the model adds to a prompt, if any.

        The text of a control token becomes that token, unless it is in a conversation's messages.
        """
        if isinstance(text, MarkedText):
            return self._marked_encoder.encode(text)
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids  # type: ignore[no-any-return]

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids; invalid UTF-8 becomes U+FFFD, unknown ids are left out."""
        ids = (i for i in token_ids if not (skip_special_tokens and self.is_special(i)))
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; joined, they are `decode`'s result.

        A token that ends inside a character is empty; the one that completes it has all of it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces = [decoder.decode(self.token_bytes(token_id)) for token_id in token_ids]
        if pieces:
            pieces[-1] += decoder.decode(b"", final=True)
        return pieces

    def offsets(self, token_ids: Sequence[int], text: str | None = None) -> list[int]:
        """Start of each token in `text`, which was encoded to `token_ids`, or in `decode`'s result.

        A token that is not in the text, such as BOS, starts where the previous one ends.
        """
        spans = None if text is None else self._spans(token_ids, text)
        if spans is None:
            ends = [*accumulate(map(len, self.pieces(token_ids)))]
            return [0, *ends][: len(ends)]
        ends = [0, *accumulate((end for _, end in spans), max)]
        return [start if end > start else ends[idx] for idx, (start, end) in enumerate(spans)]

    def _spans(self, token_ids: Sequence[int], text: str) -> list[tuple[int, int]] | None:
        """Start and end of each token in the text; None if the text encodes to other tokens."""
        for add_special_tokens in (True, False):
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
            if encoding.ids == list(token_ids):
                return encoding.offsets  # type: ignore[no-any-return]
        return None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, possibly a partial character; empty for an unknown id."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._find_bytes(token_id)
        return self._bytes[token_id]

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._read_bytes(token)

    def require_fits(self, vocab_size: int) -> None:
        """Raise UnusableModel if the base vocabulary exceeds the model's `vocab_size`.

        Added tokens may exceed it, since ordinary text does not use them.
        """
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        highest = max(set(vocabulary.values()) - self._added.keys(), default=-1)
        if highest >= vocab_size:
            raise UnusableModel(
                f"the tokenizer is not this model's: it has tokens up to {highest}; the model has "
                f"{vocab_size}, up to {vocab_size - 1}"
            )

    def added_token_id(self, text: str) -> int | None:
        """The added token whose text this is, if there is one."""
        encoded = text.encode()
        return next((i for i, added in self._added.items() if added == encoded), None)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is special; a completion's text leaves those out by default."""
        return token_id in self._special

    @property
    def added_token_ids(self) -> Mapping[int, str]:
        """The tokens that stand beside the base vocabulary, with their text."""
        return {token_id: content.decode() for token_id, content in self._added.items()}

    @cached_property
    def _marked_encoder(self) -> MarkedEncoder:
        """Control tokens are special tokens, EOS, and added tokens with which templates mark turns.

        Other added tokens, like <think>, may appear in a message.
        """
        further = getattr(self._tokenizer, "chat_control_tokens", None) or ()
        named = {self._tokenizer.eos_token, *further}
        ids = {i for i, content in self._added.items() if content.decode() in named}
        visible = [i for i, content in self._added.items() if content.strip()]
        if self._chat_template is not None:
            for text in self._chat_template.samples():
                ids |= template_tokens(self._backend, visible, text)
        return MarkedEncoder(self._backend, self._special | ids)

    @property
    def control_token_ids(self) -> frozenset[int]:
        """The tokens that the messages of a conversation cannot produce."""
        return self._marked_encoder.control_ids

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._chat_template is not None

    def render_chat(
        self, messages: Sequence[Message], options: ChatOptions = _PLAIN_CHAT
    ) -> list[int]:
        """Token ids of a conversation; see `chat_text`."""
        return self.encode(self.chat_text(messages, options), add_special_tokens=False)

    def chat_text(
        self,
        messages: Sequence[Message],
        options: ChatOptions = _PLAIN_CHAT,
        tools: Sequence[Tool] = (),
    ) -> str:
        """Render a conversation with the chat template; `encode` it without special tokens.

        As in `ChatTemplate.render`.  Raises InvalidRequest if the model has no chat template, too.
        """
        return self.chat_template.render(messages, options, tools)

    @property
    def chat_template(self) -> ChatTemplate:
        """Raises InvalidRequest if the model has none."""
        if self._chat_template is None:
            raise InvalidRequest(
                "the model has no chat template; use text completions", param="messages"
            )
        return self._chat_template


def _chat_template(
    tokenizer: Any,  # noqa: ANN401
    kwargs: Mapping[str, Any],
    *,
    allow_special_tokens: bool,
) -> ChatTemplate | None:
    sources = tokenizer.chat_template
    if not sources:
        return None
    return ChatTemplate(
        {"default": sources} if isinstance(sources, str) else sources,
        tokenizer.special_tokens_map,
        kwargs,
        allow_special_tokens=allow_special_tokens,
    )


def load_tokenizer(
    path: str | Path,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_special_tokens: bool = False,
) -> Tokenizer:
    """Load the tokenizer of a model folder or a GGUF file, with the options of Tokenizer.

    Raises UnusableModel if there is no usable one, InvalidSetting for reserved kwargs.
    """
    with as_unusable(f"model {path} has no usable tokenizer"):
        tokenizer = _from_files(Path(path))
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise UnusableModel(f"model folder {path} has no tokenizer.json")
        return Tokenizer(
            tokenizer,
            chat_template_kwargs=chat_template_kwargs,
            allow_special_tokens=allow_special_tokens,
        )


def _from_files(path: Path) -> Any:  # noqa: ANN401
    if path.is_file():
        return gguf_tokenizer(read_header(path))
    loader = PreTrainedTokenizerFast if _is_self_contained(path) else AutoTokenizer
    return loader.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _is_self_contained(folder: Path) -> bool:
    """Whether the folder declares that tokenizer.json alone defines the tokenizer.

    AutoTokenizer would ignore that, and split text according to the model type.
    """
    config = folder / "tokenizer_config.json"
    return config.exists() and json.loads(config.read_text()).get("tokenizer_class") == _BACKEND
