"""Grammars that an answer must match: JSON Schema, regular expressions, Lark."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Grammar:
    """Texts that an answer may have, up to its end token.

    source: a JSON schema as JSON text (properties come in its order), a regular expression, or Lark
    as llguidance reads it.  control_token_ids: control tokens that Lark may name as <[id]>; no
    others are sampled.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str
    control_token_ids: frozenset[int] = frozenset()
