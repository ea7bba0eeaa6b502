"""A calibration from its plan to the settings: search on some prompts, report on others."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from evals.calibrate.candidates import (
    UNPRUNED_VARIANT,
    Budgets,
    around,
    fixed_layers,
    kv_grid,
    observers,
    variant,
)
from evals.calibrate.curve import LayerCurve
from evals.calibrate.folds import Choose, Outcome, cross_validate
from evals.calibrate.measured import Measured, Prompt
from evals.calibrate.prompts import PromptsTask
from evals.calibrate.request import Found, Request
from evals.calibrate.rule import RuleSearch
from evals.calibrate.target import Target
from evals.model import Model
from evals.plan import Plan
from evals.records import RunFolder, require_same_run
from evals.run import answer, require_runs
from evals.tasks.base import Task
from evals.variants import Variant
from winnow.defaults import scaled_defaults
from winnow.errors import InvalidSetting, UnusableModel
from winnow.methods.layer_checks import require_prunable

LEAST_SCORE = 0.25  # a task that is answered worse unpruned says nothing of pruning


def calibrate(request: Request, model: Model, folder: Path, progress: Console) -> Found:
    """Measures what `folder` does not hold yet, and chooses.

    Raises WinnowError for what cannot be calibrated, or a target that nothing reaches.
    """
    identity = request.to_json() | model.identity()
    require_same_run(folder, identity)
    search = _Calibration(request, model, progress)
    search.require_possible()
    with RunFolder(folder, identity) as run:
        return search.run(run)


class _Calibration:
    """One calibration's stages, each measured before the next is known."""

    def __init__(self, request: Request, model: Model, progress: Console) -> None:
        self._request, self._model, self._progress = request, model, progress
        self._tasks = request.tasks
        self._search = range(request.num_samples)
        self._held_out = range(request.num_samples, 2 * request.num_samples)

    def require_possible(self) -> None:
        """Raise what any prompt, or the longest one unpruned, would be refused with."""
        require_prunable(scaled_defaults(self._request.shape), self._request.shape)
        with self._progress.status("checking that everything asked for can run"):
            everything = range(2 * self._request.num_samples)
            require_runs(self._plan([UNPRUNED_VARIANT], everything), self._model)

    def run(self, run: RunFolder) -> Found:
        self._run = run
        left_out = self._ask_unpruned()
        budgets = self._budgets()
        observation = self._observation(budgets)
        fixed = self._measure_layers(budgets, observation)
        chosen, validated = self._choose(budgets, observation, fixed)
        found = self._report(chosen, budgets, observation, fixed)
        return replace(found, cross_validated=validated, left_out=left_out)

    # Stages

    def _ask_unpruned(self) -> dict[str, float]:
        """Keeps the tasks that the model answers; the score of those that it does not."""
        everything = range(2 * self._request.num_samples)
        measured = self._measure([UNPRUNED_VARIANT], everything, "unpruned")
        scores = {
            task.name: measured.result(
                UNPRUNED_VARIANT, measured.prompts([task.name], self._search)
            ).score
            for task in self._tasks
        }
        if max(scores.values()) < LEAST_SCORE:
            raise UnusableModel(
                f"unpruned, the model scores {max(scores.values()):.0%} at its best task; it must "
                f"reach {LEAST_SCORE:.0%}: give prompts that it answers (--prompts)"
            )
        self._tasks = tuple(
            self._with_answers(task, measured)
            for task in self._tasks
            if scores[task.name] >= LEAST_SCORE
        )
        return {name: score for name, score in scores.items() if score < LEAST_SCORE}

    def _with_answers(self, task: Task, measured: Measured) -> Task:
        """Where a task's prompts came without answers, the unpruned ones are right."""
        if not isinstance(task, PromptsTask) or task.has_answers:
            return task
        known = range(2 * self._request.num_samples)
        answers = [measured.unpruned((task.name, index)).answer for index in known]
        return replace(task, prompts=task.prompts[: len(known)]).with_answers(answers)

    def _budgets(self) -> Budgets:
        measured = Measured(self._run.records)
        names = [task.name for task in self._tasks]
        sizes = sorted(
            measured.unpruned(prompt).num_prompt_tokens
            for prompt in measured.prompts(names, range(2 * self._request.num_samples))
        )
        median, kv = sizes[len(sizes) // 2], self._request.kv
        kv_budget = kv if isinstance(kv, int) else round(kv * median)
        if sizes[0] <= kv_budget:
            raise InvalidSetting(
                f"the shortest prompt has {sizes[0]:,} tokens; it must have more than kv_budget, "
                f"{kv_budget:,}",
                param="kv",
            )
        if not kv_grid(Budgets(median, kv_budget), self._request.shape):
            raise InvalidSetting(
                f"kv_budget would be {kv_budget:,}; it must be above the narrowest window, 8",
                param="kv",
            )
        return Budgets(median, kv_budget)

    def _observation(self, budgets: Budgets) -> dict[str, Any]:
        """The window and the kernel that keep most without a selection, with those beside them."""
        grid = kv_grid(budgets, self._request.shape)
        measured = self._measure(grid, self._search, "windows and kernels")
        prompts = self._prompts(measured)
        kept = {one.method: measured.share_kept(one, prompts) for one in grid}

        def worth(one: Variant) -> float:
            near = around(one, grid)
            return kept[one.method] + sum(kept[other.method] for other in near) / len(near)

        options = max(grid, key=worth).spec.options
        return {name: options[name] for name in ("window_size", "kernel_size")}

    def _measure_layers(self, budgets: Budgets, observation: dict[str, Any]) -> list[Variant]:
        fixed = fixed_layers(budgets, observation, self._request.shape)
        watched = observers(budgets, observation, self._request.shape)
        self._measure([*fixed, *watched], self._search, "selection layers")
        return fixed

    def _choose(
        self, budgets: Budgets, observation: dict[str, Any], fixed: list[Variant]
    ) -> tuple[Variant, float | None]:
        """The best of all that was measured, and the share that its kind keeps cross-validated.

        ASL's rules are tried only if they earn it: there are thousands, and one that happens to fit
        the prompts of the search is always among them.
        """
        measured = Measured(self._run.records)
        prompts, shape = self._prompts(measured), self._request.shape
        curve = LayerCurve(measured, fixed)
        watched = observers(budgets, observation, shape)
        rules = RuleSearch(measured, curve, watched, shape)
        by_layer = cross_validate(self._choose_layer(curve, fixed), prompts, measured)
        by_rule = cross_validate(self._choose_rule(rules), prompts, measured)
        finalists: list[Variant] = []
        if self._request.target.prefers(by_rule, by_layer):
            found = rules.finalists(prompts, self._request.target)
            finalists = [rules.variant(rule, budgets.kv_budget) for rule in found]
        measured = self._measure(finalists, self._search, "finalists")
        candidates = [*finalists, *fixed]  # of equals, ASL
        chosen = self._best(LayerCurve(measured, fixed), candidates, prompts)
        if chosen is None:
            raise self._unreached(measured, candidates)
        validated = by_rule if chosen in finalists else by_layer
        return chosen, None if validated is None else validated.kept

    def _choose_layer(self, curve: LayerCurve, fixed: Sequence[Variant]) -> Choose:
        def choose(prompts: Sequence[Prompt]) -> Callable[[Prompt], Outcome] | None:
            best = self._best(curve, fixed, prompts)
            return None if best is None else partial(curve.outcome, best)

        return choose

    def _choose_rule(self, rules: RuleSearch) -> Choose:
        def choose(prompts: Sequence[Prompt]) -> Callable[[Prompt], Outcome] | None:
            found = rules.finalists(prompts, self._request.target)
            return partial(rules.outcome, found[0]) if found else None

        return choose

    def _unreached(self, measured: Measured, candidates: Sequence[Variant]) -> InvalidSetting:
        results = [measured.result(one, self._prompts(measured)) for one in candidates]
        target = self._request.target
        if target.keep is None:
            least = min(results, key=lambda one: one.prefill)
            found = f"the least is {least.prefill:.1%}, which keeps {least.kept}"
        else:
            most = max(results, key=lambda one: one.kept.mean)
            found = f"the most is {most.kept} at {most.prefill:.1%} of prefill, with {most.name}"
        return InvalidSetting(f"no setting {target}: {found}", param="target")

    # What the stages share

    def _best(
        self, curve: LayerCurve, candidates: Sequence[Variant], prompts: Sequence[Prompt]
    ) -> Variant | None:
        target = self._request.target
        return target.best(candidates, lambda tried: curve.figures(tried, prompts))

    def _prompts(self, measured: Measured) -> list[Prompt]:
        return measured.prompts([task.name for task in self._tasks], self._search)

    def _measure(self, variants: Sequence[Variant], indices: range, what: str) -> Measured:
        if variants:
            answer(self._plan(variants, indices), self._model, self._run, self._progress, what)
        return Measured(self._run.records)

    def _plan(self, variants: Sequence[Variant], indices: range) -> Plan:
        return Plan(
            tasks=self._tasks,
            lengths=(self._request.length,),
            variants=tuple(variants),
            num_samples=len(indices),
            seed=self._request.seed,
            chat=self._request.chat,
            depths=1,
            data_dir=None,
            first_index=indices.start,
        )

    def _report(
        self,
        chosen: Variant,
        budgets: Budgets,
        observation: dict[str, Any],
        fixed: Sequence[Variant],
    ) -> Found:
        """The chosen settings beside the usual ones, on prompts that had no say."""
        measured = Measured(self._run.records)
        searched = self._prompts(measured)
        result = measured.result(chosen, searched)
        curve = LayerCurve(measured, fixed)
        rival = Target(None, result.prefill).best(fixed, lambda one: curve.figures(one, searched))
        rows = self._rows(chosen, rival, budgets, observation)
        measured = self._measure(list(rows.values()), self._held_out, "held-out prompts")
        held_out = measured.prompts([task.name for task in self._tasks], self._held_out)
        table = tuple(measured.result(tried, held_out, name) for name, tried in rows.items())
        calibrated = measured.result(chosen, held_out, "calibrated")
        keep = self._request.target.keep
        return Found(
            settings=_settings(chosen, rival),
            chosen=calibrated,
            searched=result,
            table=table,
            curve=tuple(measured.result(one, searched) for one in fixed),
            reached=keep is None or calibrated.kept.high >= keep,
        )

    def _rows(
        self,
        chosen: Variant,
        rival: Variant | None,
        budgets: Budgets,
        observation: dict[str, Any],
    ) -> dict[str, Variant]:
        defaults = scaled_defaults(self._request.shape)
        kv_budget = budgets.kv_budget
        paper = {"window_size": min(defaults.window_size, kv_budget - 1)}
        rows = {
            "full": UNPRUNED_VARIANT,
            "asl, defaults": variant(
                "asl",
                select_tokens=kv_budget,
                kv_budget=kv_budget,
                **paper,
            ),
            f"{chosen.spec.method}, calibrated": chosen,
            "snapkv, defaults": variant("snapkv", kv_budget=kv_budget, **paper),
            "snapkv, calibrated": variant("snapkv", kv_budget=kv_budget, **observation),
        }
        if rival is not None and rival != chosen:
            layer = self._request.shape.layer_name(rival.spec.options["fixed_layer"])
            rows[f"best fixed layer, {layer}"] = rival
        return rows


def _settings(chosen: Variant, rival: Variant | None) -> dict[str, Any]:
    """What goes into winnow.json: the chosen method's, and the fixed layer for fastkv."""
    fixed = {} if rival is None else {"fixed_layer": rival.spec.options["fixed_layer"]}
    return {"method": chosen.spec.method} | fixed | dict(chosen.spec.options)
