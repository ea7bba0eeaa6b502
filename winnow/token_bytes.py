"""Conversion of vocabulary tokens to the bytes they stand for."""

import json
import re
from collections.abc import Callable

from tokenizers import Tokenizer as Backend

from winnow.errors import UnusableModel

_METASPACE = "▁"  # SentencePiece's space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_reader(backend: Backend) -> Callable[[str], bytes]:
    """A function from a vocabulary token to its bytes.

    Byte-level vocabularies (as in GPT-2) write each byte as a printable character; SentencePiece
    writes text, with ▁ for a space and <0x41> for a byte.  Raises UnusableModel for any other kind.
    """
    kinds = _decoder_kinds(backend)
    if "ByteLevel" in kinds:
        return _read_byte_level
    if kinds & {"ByteFallback", "Metaspace"}:
        return _read_sentencepiece
    raise UnusableModel(
        f"tokenizer decodes with {', '.join(sorted(kinds)) or 'nothing'}; "
        "known are ByteLevel, ByteFallback and Metaspace"
    )


def _decoder_kinds(backend: Backend) -> set[str]:
    if backend.decoder is None:
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in decoder.get("decoders", [decoder])}


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's map: printable Latin-1 is itself, characters 256, 257, ... are the other bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + idx): byte for idx, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def _read_byte_level(token: str) -> bytes:
    if any(char not in _BYTE_LEVEL for char in token):
        return token.encode()  # a token added to the vocabulary as plain text
    return bytes(_BYTE_LEVEL[char] for char in token)


def _read_sentencepiece(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_METASPACE, " ").encode()
