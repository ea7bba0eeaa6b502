"""Encoding of chat prompts so that only the template, not a client, can write control tokens.

Where a client's text would become a control token, alone or joined with adjacent template text, it
is encoded as ordinary characters. Everything else is encoded as usual.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from winnow.errors import InvalidRequest
from winnow.marked_text import BREAK, CLIENT, FINAL, MarkedText, plain

_MAX_TRIES = 8  # breaking up one control token may form another


class MarkedEncoder:
    """Encodes marked text. Thread-safe.

    control_ids: tokens that only the template may write.
    """

    def __init__(self, backend: Backend, control_ids: Iterable[int]) -> None:
        self._backend = backend
        self.control_ids = frozenset(control_ids)

    def encode(self, text: MarkedText) -> list[int]:
        """Token ids of the text; no control token includes characters that a client wrote.

        Raises InvalidRequest for a control token that cannot be encoded in another way.
        """
        backend = self._backend
        for _ in range(_MAX_TRIES):
            encoding = backend.encode(text, add_special_tokens=False)
            forged = [one for one in _found(encoding, text, self.control_ids) if one.is_clients]
            if not forged:
                return encoding.ids
            text = _broken(text, forged)
            backend = self._breaking
        raise InvalidRequest(
            f"a message has {backend.id_to_token(forged[0].token_id)!r}, a control token that "
            "cannot be written as text",
            param="messages",
        )

    @cached_property
    def _breaking(self) -> Backend:
        """The tokenizer, changed so that a BREAK in a text splits an added token and is dropped."""
        content = json.loads(self._backend.to_str())
        drops_break = {"type": "Replace", "pattern": {"String": BREAK}, "content": ""}
        own = content["normalizer"]
        normalizers = [drops_break] if own is None else [drops_break, own]
        content["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
        for token in content["added_tokens"]:
            token["normalized"] = False  # matched before the normalizer drops BREAK
        return Backend.from_str(json.dumps(content))


def template_tokens(backend: Backend, added_ids: Iterable[int], text: str) -> frozenset[int]:
    """The tokens among `added_ids` that the template wrote in a rendered text."""
    if not isinstance(text, MarkedText):
        return frozenset()
    encoding = backend.encode(text, add_special_tokens=False)
    found = _found(encoding, text, frozenset(added_ids))
    return frozenset(one.token_id for one in found if not one.is_clients)


@dataclass(frozen=True, slots=True)
class _Found:
    """A token and its span in a text; is_clients: a client wrote part of it."""

    token_id: int
    start: int
    end: int
    is_clients: bool


def _found(encoding: Encoding, text: MarkedText, ids: frozenset[int]) -> Iterator[_Found]:
    """The occurrences of these tokens, without the whitespace that a token may include."""
    characters = plain(text)
    for idx, token_id in enumerate(encoding.ids):
        if token_id in ids:
            place = encoding.token_to_chars(idx)
            assert place is not None, "it was seen in the text"
            covered = characters[place[0] : place[1]]
            start = place[0] + len(covered) - len(covered.lstrip())
            end = place[0] + len(covered.rstrip())
            yield _Found(token_id, start, end, _has_clients(text.marks[start:end]))


def _has_clients(marks: bytes) -> bool:
    return CLIENT in marks or CLIENT | FINAL in marks


def _broken(text: MarkedText, tokens: list[_Found]) -> MarkedText:
    """The text with BREAK next to each client character inside these tokens."""
    characters, marks = plain(text), text.marks
    pieces: list[tuple[str, bytes]] = []
    done = 0
    for token in tokens:
        for at in range(token.start + 1, token.end):
            if _has_clients(marks[at - 1 : at + 1]):
                pieces += [(characters[done:at], marks[done:at]), (BREAK, bytes([CLIENT]))]
                done = at
    pieces.append((characters[done:], marks[done:]))
    return MarkedText("".join(piece for piece, _ in pieces), b"".join(m for _, m in pieces))
