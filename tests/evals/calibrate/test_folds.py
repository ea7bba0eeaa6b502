"""A way of choosing is worth what it gets on prompts that had no say."""

from collections.abc import Callable, Sequence

import pytest

from evals.calibrate.candidates import UNPRUNED_VARIANT
from evals.calibrate.folds import Outcome, cross_validate
from evals.calibrate.measured import Measured, Prompt
from evals.calibrate.target import Tradeoff
from tests.evals.calibrate.records import record

PROMPTS: list[Prompt] = [(task, index) for task in ("passkey", "needle") for index in range(6)]
MEASURED = Measured(
    record(UNPRUNED_VARIANT.method, 1.0, None, task=task, index=index) for task, index in PROMPTS
)


def test_what_fits_only_the_prompts_it_was_chosen_by_keeps_nothing() -> None:
    def learn_by_heart(known: Sequence[Prompt]) -> Callable[[Prompt], Outcome]:
        return lambda prompt: Outcome(float(prompt in known), 0.5)

    assert cross_validate(learn_by_heart, PROMPTS, MEASURED) == Tradeoff(0.0, 0.5)


def test_every_prompt_is_answered_once_and_prompts_of_one_index_together() -> None:
    answered: list[Prompt] = []

    def choose(known: Sequence[Prompt]) -> Callable[[Prompt], Outcome]:
        def outcome(prompt: Prompt) -> Outcome:
            answered.append(prompt)
            assert prompt[1] not in {index for _, index in known}
            return Outcome(1.0, 0.25)

        return outcome

    assert cross_validate(choose, PROMPTS, MEASURED) == Tradeoff(1.0, 0.25)
    assert sorted(answered) == sorted(PROMPTS)


@pytest.mark.parametrize("last", [0, 5])
def test_nothing_is_worth_what_chooses_nothing_on_some_fold(last: int) -> None:
    def choose(known: Sequence[Prompt]) -> Callable[[Prompt], Outcome] | None:
        return (lambda _: Outcome(1.0, 0.5)) if ("passkey", last) in known else None

    assert cross_validate(choose, PROMPTS, MEASURED) is None
