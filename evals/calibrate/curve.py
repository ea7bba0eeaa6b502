"""Scores by selection layer, evened out: luck on a few prompts is not believed.

A layer's scores are evened out with those of more and fewer tokens selected there, not with the
layers beside it: in real models layers that find the answer alternate with layers that do not.
"""

from collections.abc import Sequence

from evals.calibrate.folds import Outcome
from evals.calibrate.measured import Measured, Prompt, mean_over_tasks
from evals.calibrate.target import Tradeoff
from evals.variants import Variant


class LayerCurve:
    """Answers at fixed layers, with each number of selected tokens.

    layers: those that were measured, ascending.
    """

    def __init__(self, measured: Measured, fixed: Sequence[Variant]) -> None:
        self._measured = measured
        self._by_layer: dict[int, dict[int, Variant]] = {}
        for tried in fixed:
            options = tried.spec.options
            layer = self._by_layer.setdefault(options["fixed_layer"], {})
            layer[options["select_tokens"]] = tried
        self.layers = tuple(sorted(self._by_layer))
        self._scores: dict[tuple[Prompt, int, int], float] = {}  # asked for by thousands of rules

    def score(self, prompt: Prompt, select_tokens: int, layer_idx: int) -> float:
        """The mean over a number of selected tokens and the ones beside it.

        Of the measured layer nearest to `layer_idx`.
        """
        asked = (prompt, select_tokens, layer_idx)
        if asked not in self._scores:
            self._scores[asked] = self._mean_score(*asked)
        return self._scores[asked]

    def _mean_score(self, prompt: Prompt, select_tokens: int, layer_idx: int) -> float:
        layer = self._by_layer[min(self.layers, key=lambda one: abs(one - layer_idx))]
        sizes = sorted(layer)
        place = sizes.index(select_tokens)
        near = sizes[max(0, place - 1) : place + 2]
        return sum(self._measured.of(layer[size], prompt).score for size in near) / len(near)

    def kept(self, prompts: Sequence[Prompt], select_tokens: int, layers: Sequence[int]) -> float:
        """Share of the unpruned score, with a selection layer for each prompt."""
        pairs = zip(prompts, layers, strict=True)
        pruned = mean_over_tasks(
            (prompt[0], self.score(prompt, select_tokens, layer)) for prompt, layer in pairs
        )
        full = mean_over_tasks((p[0], self._measured.unpruned(p).score) for p in prompts)
        return pruned / full if full else 1.0

    def figures(self, tried: Variant, prompts: Sequence[Prompt]) -> Tradeoff:
        """A measured variant's figures: what it kept, or what its layers did if less."""
        select_tokens = tried.spec.options["select_tokens"]
        records = [self._measured.of(tried, prompt) for prompt in prompts]
        layers = [
            record.selection_layer for record in records if record.selection_layer is not None
        ]
        own = self._measured.share_kept(tried, prompts)
        prefill = sum(record.computed_share for record in records) / len(records)
        return Tradeoff(min(own, self.kept(prompts, select_tokens, layers)), prefill)

    def outcome(self, tried: Variant, prompt: Prompt) -> Outcome:
        """What a prompt scores and computes with a fixed layer."""
        options = tried.spec.options
        score = self.score(prompt, options["select_tokens"], options["fixed_layer"])
        return Outcome(score, self._measured.of(tried, prompt).computed_share)
