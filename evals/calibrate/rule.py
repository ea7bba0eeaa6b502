"""Where ASL would select under other settings, and what it would score there, by look-up.

ASL is FastKV at the layer that its rule chooses. So rho of one run that never selects, and the
answers at fixed layers, say what any threshold, min_layer and latest_layer would give.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import repeat

from evals.calibrate.candidates import THRESHOLDS, variant
from evals.calibrate.curve import LayerCurve
from evals.calibrate.measured import Measured, Prompt
from evals.calibrate.target import Target, Tradeoff
from evals.variants import Variant

_NO_VARIANCE = 1e-15
_FINALISTS = 3


@dataclass(frozen=True, slots=True)
class Rule:
    """ASL's settings that say where it selects."""

    observed_layers: int
    min_layer: int
    threshold: float
    latest_layer: int
    select_tokens: int

    def layer_for(self, rho: Sequence[tuple[int, float]]) -> int:
        """Where it selects on a prompt, from rho relative to any layer up to min_layer."""
        by_layer = dict(rho)
        first = by_layer[self.min_layer] or _NO_VARIANCE
        for layer_idx in range(self.min_layer, self.latest_layer):
            relative = 1.0 if layer_idx == self.min_layer else by_layer[layer_idx] / first
            if relative < self.threshold:
                return layer_idx
        return self.latest_layer


class RuleSearch:
    """Rules over prompts whose answers at fixed layers and whose rho were measured."""

    def __init__(
        self,
        measured: Measured,
        curve: LayerCurve,
        prompts: Sequence[Prompt],
        observers: Sequence[Variant],
        num_layers: int,
    ) -> None:
        self._measured, self._curve, self._prompts = measured, curve, prompts
        self._num_layers = num_layers
        self._observers = {
            (one.spec.options["select_tokens"], one.spec.options["observed_layers"]): one
            for one in observers
        }

    def finalists(self, target: Target) -> list[Rule]:
        """The most promising rules, one for each way in which they choose layers."""
        by_choice: dict[tuple[int, ...], tuple[Rule, Tradeoff]] = {}
        for rule in self._rules():
            layers = self._layers(rule)
            found = self._figures(rule, layers)
            if target.reached_by(found) and (rule.select_tokens, *layers) not in by_choice:
                by_choice[rule.select_tokens, *layers] = (rule, found)
        adaptive = [found for choice, found in by_choice.items() if len(set(choice[1:])) > 1]
        ordered = sorted(adaptive, key=lambda one: target.order(one[1]))
        return [rule for rule, _ in ordered[:_FINALISTS]]

    def _rules(self) -> Iterator[Rule]:
        for select_tokens, observed in self._observers:
            for latest in self._curve.layers:
                for min_layer in range(observed - 1, latest):
                    for threshold in THRESHOLDS:
                        yield Rule(observed, min_layer, threshold, latest, select_tokens)

    def _layers(self, rule: Rule) -> list[int]:
        observer = self._observers[rule.select_tokens, rule.observed_layers]
        return [rule.layer_for(self._measured.of(observer, prompt).rho) for prompt in self._prompts]

    def _figures(self, rule: Rule, layers: Sequence[int]) -> Tradeoff:
        kept = self._curve.kept(self._prompts, rule.select_tokens, layers)
        return Tradeoff(
            kept, sum(map(self._share, repeat(rule), self._prompts, layers)) / len(layers)
        )

    def _share(self, rule: Rule, prompt: Prompt, layer_idx: int) -> float:
        """Of the layer-tokens, with this selection layer."""
        num_tokens = self._measured.unpruned(prompt).num_prompt_tokens
        whole = (layer_idx + 1) / self._num_layers
        return whole + (1 - whole) * rule.select_tokens / num_tokens

    def variant(self, rule: Rule, kv_budget: int) -> Variant:
        """ASL with this rule, and the observers' window and kernel."""
        observer = self._observers[rule.select_tokens, rule.observed_layers]
        own = {field.name: getattr(rule, field.name) for field in fields(rule)}
        return variant("asl", **(dict(observer.spec.options) | own | {"kv_budget": kv_budget}))
