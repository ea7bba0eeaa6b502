"""No selection: every layer computes every token."""

from torch import Tensor

from winnow.selection.base import Selection


class NoSelection:
    """Selects nothing, for the given reason (`off` or `short_prompt`)."""

    rho: tuple[tuple[int, float], ...] = ()

    def __init__(self, reason: str) -> None:
        self.no_selection_reason = reason

    def needs_scores(self, layer_idx: int) -> bool:
        return False

    def observe(self, layer_idx: int, mass: Tensor) -> Selection | None:
        return None
