"""LongRoPE (arXiv 2402.13753): one set of frequencies for short sequences, another for long ones.

transformers chooses between them by the largest position of a call. So a sequence would be rotated
by one set in prefill and by the other in decode, and a batch by what its longest row needs. Here
each sequence has its own, chosen before it begins (ModelDescription.is_long).

Families' modules choose frequencies and factors in ways of their own. What they choose is seen
where a module is asked for positions of one kind alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from winnow.folder_errors import cannot_run
from winnow.rotary import LONG

_TYPE = "longrope"

# From angles [..., n] to those of the 2n numbers of a table.
_Layout = Callable[[Tensor], Tensor]


def _halves(angles: Tensor) -> Tensor:
    return torch.cat([angles, angles], dim=-1)


def _pairs(angles: Tensor) -> Tensor:
    return angles.repeat_interleave(2, dim=-1)


def has_long_rope(config: Any) -> bool:  # noqa: ANN401 - each family has its own class
    """Whether all layers share tables that are longrope's."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type") == _TYPE


@dataclass(frozen=True, slots=True, eq=False)
class _Tables:
    """What tables are made of: frequencies [n] float32, a factor, and where the numbers stand."""

    frequencies: Tensor
    factor: float
    layout: _Layout

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions [B, T], each [B, T, 2n] float32."""
        angles = self.layout(positions[..., None].float() * self.frequencies)
        return angles.cos() * self.factor, angles.sin() * self.factor


class LongRope(nn.Module):
    """Takes the place of a network's rotary embedding.

    rotary: transformers' module, of which another one is asked.
    Raises UnusableModel if its tables are no cosines and sines of frequencies.
    """

    def __init__(self, rotary: Any, config: Any) -> None:  # noqa: ANN401
        super().__init__()
        original = config.rope_parameters["original_max_position_embeddings"]
        with torch.device("cpu"), torch.no_grad():
            short, long = (
                _measured(type(rotary)(config), last) for last in (original - 1, original)
            )
        if short is None or long is None or short.layout is not long.layout:
            reason = "its longrope tables are no cosines and sines of two sets of frequencies"
            raise cannot_run(config.model_type, reason)
        self._layout, self._factors = short.layout, (short.factor, long.factor)
        device = rotary.inv_freq.device
        self._short = nn.Buffer(short.frequencies.to(device), persistent=False)
        self._long = nn.Buffer(long.frequencies.to(device), persistent=False)

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tables for positions [B, T] int64, with LONG added where the long ones are due.

        Cosines and sines, each [B, T, rotary size] of `like`'s dtype.
        """
        is_long = (positions >= LONG)[..., None]
        frequencies = torch.where(is_long, self._long, self._short)
        angles = self._layout((positions % LONG)[..., None].float() * frequencies)
        short, long = self._factors
        factor = torch.where(is_long, long, short)
        return (angles.cos() * factor).to(like.dtype), (angles.sin() * factor).to(like.dtype)


def _measured(rotary: Any, last: int) -> _Tables | None:  # noqa: ANN401
    """What a module makes its tables of where `last` is the largest position; None if unknown."""
    positions = torch.tensor([[0, 1, last // 2, last]])
    given = rotary(torch.empty(0, dtype=torch.float32), positions)
    if not isinstance(given, tuple):
        return None
    factor = float(given[0][0, 0, 0])  # the cosine of 0 is 1
    for frequencies in (rotary.inv_freq, rotary.original_inv_freq):
        for layout in (_halves, _pairs):
            found = _Tables(frequencies.clone(), factor, layout)
            made = found.table(positions)
            if all(_same(one, other) for one, other in zip(made, given, strict=True)):
                return found
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)
