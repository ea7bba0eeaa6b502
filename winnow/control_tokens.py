"""Control tokens in a prompt: the template's are tokens, a client's are text.

Where a client's text would become a control token, alone or together with what the template writes
beside it, it is encoded as any other characters would be; all else is encoded as ever.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from winnow.errors import InvalidRequest
from winnow.marked_text import BREAK, CLIENT, FINAL, MarkedText, plain

_MAX_TRIES = 8  # characters set free by a break may make another token


class MarkedEncoder:
    """Encodes marked text; usable from any thread.

    control_ids: tokens that only the template may write.
    """

    def __init__(self, backend: Backend, control_ids: Iterable[int]) -> None:
        self._backend = backend
        self.control_ids = frozenset(control_ids)

    def encode(self, text: MarkedText) -> list[int]:
        """The text's tokens, none of them a control token that a client wrote any part of.

        Raises InvalidRequest for one that the vocabulary cannot write in another way.
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
        """The tokenizer, but BREAK in a text keeps it from seeing a token there, and is no text."""
        content = json.loads(self._backend.to_str())
        drops_break = {"type": "Replace", "pattern": {"String": BREAK}, "content": ""}
        own = content["normalizer"]
        normalizers = [drops_break] if own is None else [drops_break, own]
        content["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
        for token in content["added_tokens"]:
            token["normalized"] = False  # seen before the normalizer drops BREAK, not after
        return Backend.from_str(json.dumps(content))


def template_tokens(backend: Backend, added_ids: Iterable[int], text: str) -> frozenset[int]:
    """Those of `added_ids` with which a template surrounds the messages of a rendered text."""
    if not isinstance(text, MarkedText):
        return frozenset()
    encoding = backend.encode(text, add_special_tokens=False)
    found = _found(encoding, text, frozenset(added_ids))
    return frozenset(one.token_id for one in found if not one.is_clients)


@dataclass(frozen=True, slots=True)
class _Found:
    """A token where it is in a text; is_clients: a client wrote some of it."""

    token_id: int
    start: int
    end: int
    is_clients: bool


def _found(encoding: Encoding, text: MarkedText, ids: frozenset[int]) -> Iterator[_Found]:
    """Where these tokens are, less the white space that a token may take with it."""
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
    """The text with BREAK beside each of the client's characters within these tokens."""
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
