"""What a way of choosing is worth: what it chooses by some prompts, tried on the others.

The more there is to choose from, the more of the best one's score is luck. That luck does not last
on prompts that had no say.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evals.calibrate.measured import Measured, Prompt
from evals.calibrate.target import Tradeoff

_MAX_FOLDS = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """A prompt's score, and the share of its prefill that was computed for it."""

    score: float
    prefill: float


# Chooses settings by some prompts; they say what another prompt's outcome is.
Choose = Callable[[Sequence[Prompt]], Callable[[Prompt], Outcome] | None]


def cross_validate(
    choose: Choose, prompts: Sequence[Prompt], measured: Measured
) -> Tradeoff | None:
    """What is kept and computed where each fold is answered by what the others choose.

    None if the others of a fold choose nothing, or there is only one fold.
    """
    num_folds = min(_MAX_FOLDS, len({index for _, index in prompts}))
    if num_folds < 2:
        return None
    outcomes: list[Outcome] = []
    for fold in range(num_folds):
        chosen = choose([prompt for prompt in prompts if prompt[1] % num_folds != fold])
        if chosen is None:
            return None
        outcomes += [chosen(prompt) for prompt in prompts if prompt[1] % num_folds == fold]
    full = sum(measured.unpruned(prompt).score for prompt in prompts)
    kept = sum(one.score for one in outcomes) / full if full else 1.0
    return Tradeoff(kept, sum(one.prefill for one in outcomes) / len(outcomes))
