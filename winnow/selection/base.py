"""What every selection method answers."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The decision to cut a prompt: `kept` [num_kept] int64 are ascending token indices."""

    kept: Tensor


class Selector(Protocol):
    """One prompt's selection, asked once after each layer until it selects."""

    @property
    def rho(self) -> tuple[tuple[int, float], ...]:
        """(layer, relative rank variance) for each layer at which it was looked at."""

    @property
    def no_selection_reason(self) -> str:
        """Why nothing was selected, if nothing was."""

    def needs_scores(self, layer_idx: int) -> bool:
        """Whether `observe` wants this layer's attention."""

    def observe(self, layer_idx: int, mass: Tensor) -> Selection | None:
        """Looks at a layer's observed attention [num_heads, num_tokens]; a decision or None."""
