"""Which tokens of a prompt go on, and at which layer: the choices that methods are made of."""

from winnow.selection.asl import AdaptiveSelection
from winnow.selection.last_query import most_relevant
from winnow.selection.window_scores import best_tokens, token_scores

__all__ = ["AdaptiveSelection", "best_tokens", "most_relevant", "token_scores"]
