"""Token selection shared by methods: which tokens continue, and from which layer."""

from winnow.selection.asl import AdaptiveSelection
from winnow.selection.last_query import most_relevant, relevance
from winnow.selection.window_scores import best_tokens, token_scores

__all__ = ["AdaptiveSelection", "best_tokens", "most_relevant", "relevance", "token_scores"]
