"""A pruning method of your own in one file; docs/methods.md explains it.

Run it with `python examples/peak_method.py`.
"""

from winnow.methods.base import Bound, Cut, LayerView, Method
from winnow.pruning_settings import PruningSettings
from winnow.scoring import descending_order, pooled_scores, with_window


class Peak(Method):
    """After layer `fixed_layer`, the tokens that some head attends to most, and the window."""

    @classmethod
    def token_bound(cls, settings: PruningSettings) -> Bound:
        return Bound(settings.select_tokens, "select_tokens")

    def cut(self, view: LayerView) -> Cut | None:
        if view.layer_idx != self.settings.fixed_layer:
            return None
        window = self.settings.window_size
        scores = pooled_scores(view.window_mass, window, self.settings.kernel_size)  # [H, n]
        best = descending_order(scores.amax(0))[: self.settings.select_tokens - window]
        return Cut(with_window(best, view.num_tokens, window))


if __name__ == "__main__":
    from winnow import Winnow
    from winnow.catalog import METHODS

    METHODS["peak"] = "__main__:Peak"
    fact = "One of the special magic numbers for quick-fox is: 48219. "
    question = "\nQuestion: What is the special magic number for quick-fox?\nAnswer:"
    filler = "The grass is green. The sky is blue. " * 40
    completion = Winnow.load(method="peak", select_tokens=256).generate(
        filler + fact + filler + question, stop=("\n",)
    )
    report = completion.report
    print(completion.text.strip())
    print(f"{report.num_selected_tokens:,} of {report.num_prompt_tokens:,} tokens went on")
