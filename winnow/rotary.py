"""Rotary tables: by what the layers rotate the queries and keys of some tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from winnow.token_extras import TokenExtras

# Added to the positions of a sequence that is rotated by a model's long tables (long_rope.py), so
# that one number says all that a table depends on.
LONG = 1 << 40

# As a family's layers take it: cosines and sines, each [B, T, rotary size], or one tensor of both.
Table = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class RotaryTables:
    """Those of tokens at `positions` [B, T] int64.

    by_kind: a table for each kind of layer that the family tells apart.
    asked: the positions as `DecoderModel.rope` was told of them; None: they are the same.
    extras: None for a family whose layers take nothing else.
    """

    positions: Tensor
    by_kind: Mapping[str, Table]
    asked: Tensor | None = None
    extras: TokenExtras | None = None

    def take(self, tokens: Tensor | slice) -> "RotaryTables":
        """Those of some of the T tokens: of a slice, or of indices [num_tokens] int64."""
        by_kind = {kind: _take(table, tokens) for kind, table in self.by_kind.items()}
        asked = None if self.asked is None else self.asked[:, tokens]
        extras = None if self.extras is None else self.extras.take(tokens)
        return RotaryTables(self.positions[:, tokens], by_kind, asked, extras)


def _take(table: Table, tokens: Tensor | slice) -> Table:
    if isinstance(table, Tensor):
        return table[:, tokens]
    return tuple(part[:, tokens] for part in table)
