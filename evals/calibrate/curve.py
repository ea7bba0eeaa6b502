"""Scores by selection layer, evened out: one layer's luck on a few prompts is not believed."""

from collections.abc import Sequence

from evals.calibrate.measured import Measured, Prompt, mean_over_tasks
from evals.calibrate.target import Tradeoff
from evals.variants import Variant


class LayerCurve:
    """Answers at fixed layers, one curve for each number of selected tokens."""

    def __init__(self, measured: Measured, fixed: Sequence[Variant]) -> None:
        self._measured = measured
        self._curves: dict[int, dict[int, Variant]] = {}
        for tried in fixed:
            options = tried.spec.options
            self._curves.setdefault(options["select_tokens"], {})[options["fixed_layer"]] = tried

    def layers(self, select_tokens: int) -> list[int]:
        """Those that were measured, ascending."""
        return sorted(self._curves[select_tokens])

    def score(self, prompt: Prompt, select_tokens: int, layer_idx: int) -> float:
        """The mean over the measured layer nearest to a layer and the ones beside it."""
        curve, layers = self._curves[select_tokens], self.layers(select_tokens)
        place = min(range(len(layers)), key=lambda idx: abs(layers[idx] - layer_idx))
        near = layers[max(0, place - 1) : place + 2]
        scores = [self._measured.of(curve[layer], prompt).score for layer in near]
        return sum(scores) / len(scores)

    def kept(self, prompts: Sequence[Prompt], select_tokens: int, layers: Sequence[int]) -> float:
        """Share of the unpruned score, with a selection layer for each prompt."""
        pairs = zip(prompts, layers, strict=True)
        pruned = mean_over_tasks(
            (prompt[0], self.score(prompt, select_tokens, layer)) for prompt, layer in pairs
        )
        full = mean_over_tasks((p[0], self._measured.unpruned(p).score) for p in prompts)
        return pruned / full if full else 1.0

    def figures(self, tried: Variant, prompts: Sequence[Prompt]) -> Tradeoff:
        """A measured variant's figures: what it kept, or what its layers' neighbours did if less.

        A prompt too short to be cut counts as cut at the last layer of the curve.
        """
        select_tokens = tried.spec.options["select_tokens"]
        last = self.layers(select_tokens)[-1]
        records = [self._measured.of(tried, prompt) for prompt in prompts]
        layers = [last if r.selection_layer is None else r.selection_layer for r in records]
        own = self._measured.share_kept(tried, prompts)
        prefill = sum(record.computed_share for record in records) / len(records)
        return Tradeoff(min(own, self.kept(prompts, select_tokens, layers)), prefill)
