"""Where ASL would select under other settings, and what it would score there, by look-up.

ASL is FastKV at the layer that its rule chooses. So rho of one run that never selects, and the
answers at fixed layers, say what any threshold, min_layer and latest_layer would give.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from typing import TYPE_CHECKING

from evals.calibrate.candidates import THRESHOLDS, variant
from evals.calibrate.curve import LayerCurve
from evals.calibrate.folds import Outcome
from evals.calibrate.measured import Measured, Prompt
from evals.calibrate.target import Target, Tradeoff
from evals.variants import Variant

if TYPE_CHECKING:
    from winnow.kv import ModelShape  # loads torch

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
        for layer_idx in sorted(by_layer):
            if not self.min_layer <= layer_idx < self.latest_layer:
                continue
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
        observers: Sequence[Variant],
        shape: "ModelShape",
    ) -> None:
        self._measured, self._curve = measured, curve
        self._shape = shape
        self._observers = {
            (one.spec.options["select_tokens"], one.spec.options["observed_layers"]): one
            for one in observers
        }

    def finalists(self, prompts: Sequence[Prompt], target: Target) -> list[Rule]:
        """The best rules by some prompts, one for each way in which they choose layers."""
        by_choice: dict[tuple[int, ...], tuple[Rule, Tradeoff]] = {}
        for rule in self._rules():
            layers = [self._layer(rule, prompt) for prompt in prompts]
            found = self._figures(rule, prompts, layers)
            if target.reached_by(found) and (rule.select_tokens, *layers) not in by_choice:
                by_choice[rule.select_tokens, *layers] = (rule, found)
        adaptive = [found for choice, found in by_choice.items() if len(set(choice[1:])) > 1]
        ordered = sorted(adaptive, key=lambda one: target.order(one[1]))
        return [rule for rule, _ in ordered[:_FINALISTS]]

    def outcome(self, rule: Rule, prompt: Prompt) -> Outcome:
        """What a prompt would score and compute."""
        layer_idx = self._layer(rule, prompt)
        score = self._curve.score(prompt, rule.select_tokens, layer_idx)
        return Outcome(score, self._share(rule, prompt, layer_idx))

    def _rules(self) -> Iterator[Rule]:
        for select_tokens, observed in self._observers:
            for latest in self._curve.layers:
                for min_layer in self._earliest_layers(observed, latest):
                    for threshold in THRESHOLDS:
                        yield Rule(observed, min_layer, threshold, latest, select_tokens)

    def _earliest_layers(self, observed: int, latest: int) -> list[int]:
        """The full layers below `latest` up to which so many are full."""
        return [layer for layer in self._shape.full_layers[observed - 1 :] if layer < latest]

    def _layer(self, rule: Rule, prompt: Prompt) -> int:
        observer = self._observers[rule.select_tokens, rule.observed_layers]
        return rule.layer_for(self._measured.of(observer, prompt).rho)

    def _figures(self, rule: Rule, prompts: Sequence[Prompt], layers: Sequence[int]) -> Tradeoff:
        kept = self._curve.kept(prompts, rule.select_tokens, layers)
        return Tradeoff(kept, sum(map(self._share, repeat(rule), prompts, layers)) / len(layers))

    def _share(self, rule: Rule, prompt: Prompt, layer_idx: int) -> float:
        """Of the layer-tokens, with this selection layer."""
        num_tokens = self._measured.unpruned(prompt).num_prompt_tokens
        whole = (layer_idx + 1) / self._shape.num_layers
        return whole + (1 - whole) * rule.select_tokens / num_tokens

    def variant(self, rule: Rule, kv_budget: int) -> Variant:
        """ASL with this rule, and the observers' window and kernel."""
        observer = self._observers[rule.select_tokens, rule.observed_layers]
        own = {field.name: getattr(rule, field.name) for field in fields(rule)}
        return variant("asl", **(dict(observer.spec.options) | own | {"kv_budget": kv_budget}))
