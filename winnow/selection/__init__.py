"""At which layer a prompt is cut, and which of its tokens go on. One method, one file.

A method watches a prompt layer by layer. To add one: write its file, add its line to `create`, and
its name to `winnow.request.SELECTIONS`. Methods that start the prompt again with the chosen tokens
(two-pass, as GemFilter) use the same interface: their `Selection` carries `restart`, which the
prefill engine answers, in `_PrefillRun._select`, by computing from layer 0 once more.
"""

from winnow.request import PruningSettings
from winnow.selection.asl import AdaptiveSelection
from winnow.selection.base import Selection, Selector
from winnow.selection.fixed import FixedSelection
from winnow.selection.off import NoSelection

__all__ = ["Selection", "Selector", "create"]


def create(settings: PruningSettings, num_tokens: int) -> Selector:
    """The selector for one prompt of `num_tokens` tokens."""
    if settings.selection == "none":
        return NoSelection("off")
    if num_tokens <= max(settings.select_tokens, settings.window_size):
        return NoSelection("short_prompt")
    if settings.selection == "fixed":
        return FixedSelection(settings)
    return AdaptiveSelection(settings)
