"""Where ASL would select under other settings, and what it would score there, by look-up.

ASL is FastKV at the layer that its rule chooses. So rho of one run that never selects, and the
answers at fixed layers, say what any threshold, min_layer and latest_layer would give.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from evals.calibrate.candidates import THRESHOLDS, Budgets, fixed_layers, observers, variant
from evals.calibrate.measured import Measured, Prompt, mean_over_tasks
from evals.calibrate.target import Figures, Target
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
        prompts: Sequence[Prompt],
        budgets: Budgets,
        observation: dict[str, Any],
        num_layers: int,
    ) -> None:
        self._measured, self._prompts = measured, prompts
        self._budgets, self._observation = budgets, observation
        self._num_layers = num_layers
        self._fixed: dict[int, dict[int, Variant]] = {}
        for tried in fixed_layers(budgets, observation, num_layers):
            options = tried.spec.options
            self._fixed.setdefault(options["select_tokens"], {})[options["fixed_layer"]] = tried
        self._observers = {
            (one.spec.options["select_tokens"], one.spec.options["observed_layers"]): one
            for one in observers(budgets, observation, num_layers)
        }

    def finalists(self, target: Target) -> list[Variant]:
        """The most promising rules, one for each way in which they choose layers."""
        by_choice: dict[tuple[int, ...], tuple[Rule, Figures]] = {}
        for rule in self._rules():
            layers = self._layers(rule)
            found = self._figures(rule, layers)
            if target.reached_by(found) and (rule.select_tokens, *layers) not in by_choice:
                by_choice[rule.select_tokens, *layers] = (rule, found)
        adaptive = [found for choice, found in by_choice.items() if len(set(choice[1:])) > 1]
        ordered = sorted(adaptive, key=lambda one: target.order(one[1]))
        return [self._variant(rule) for rule, _ in ordered[:_FINALISTS]]

    def _rules(self) -> Iterator[Rule]:
        for select_tokens, observed in self._observers:
            for latest in self._fixed[select_tokens]:
                for min_layer in range(observed - 1, latest):
                    for threshold in THRESHOLDS:
                        yield Rule(observed, min_layer, threshold, latest, select_tokens)

    def _layers(self, rule: Rule) -> list[int]:
        observer = self._observers[rule.select_tokens, rule.observed_layers]
        return [rule.layer_for(self._measured.of(observer, prompt).rho) for prompt in self._prompts]

    def _figures(self, rule: Rule, layers: Sequence[int]) -> Figures:
        """From the answers at the measured layers nearest to those chosen."""
        fixed = self._fixed[rule.select_tokens]
        scores, full, shares = [], [], []
        for prompt, layer_idx in zip(self._prompts, layers, strict=True):
            nearest = min(fixed, key=lambda known: abs(known - layer_idx))
            record = self._measured.of(fixed[nearest], prompt)
            scores.append((prompt[0], record.score))
            full.append((prompt[0], self._measured.unpruned(prompt).score))
            selected = min(1.0, rule.select_tokens / record.num_prompt_tokens)
            whole = (layer_idx + 1) / self._num_layers
            shares.append(whole + (1 - whole) * selected)
        kept = mean_over_tasks(scores) / (mean_over_tasks(full) or 1.0)
        return Figures(kept, sum(shares) / len(shares))

    def _variant(self, rule: Rule) -> Variant:
        return variant(
            "asl",
            observed_layers=rule.observed_layers,
            min_layer=rule.min_layer,
            threshold=rule.threshold,
            latest_layer=rule.latest_layer,
            select_tokens=rule.select_tokens,
            kv_budget=self._budgets.kv_budget,
            **self._observation,
        )
