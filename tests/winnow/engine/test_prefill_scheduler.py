"""The scheduler alone, on a clock that counts the layer-tokens that were computed."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.engine.prefill_scheduler import PATIENCE, PrefillScheduler

LAYERS = 24
LONG, SHORT = 8000, 256


@dataclass(eq=False)
class Prompt:
    """arrives, began, ended: layer-tokens computed until then."""

    arrives: int
    num_tokens: int
    layers_left: int = LAYERS
    can_go_on: bool = True
    began: int | None = None
    ended: int = 0

    @property
    def is_open(self) -> bool:
        return self.began is not None and self.layers_left > 0

    @property
    def next_layer_tokens(self) -> int:
        return self.num_tokens

    @property
    def layer_tokens_left(self) -> int:
        return self.layers_left * self.num_tokens

    @property
    def own_work(self) -> int:
        return LAYERS * self.num_tokens

    @property
    def waited(self) -> int:
        """What it ended later than it would have alone."""
        return self.ended - self.arrives - self.own_work


def run(prompts: Sequence[Prompt], max_open: int = 4) -> list[Prompt]:
    """Compute all prompts, given in order of arrival; returns which one each layer was of."""
    scheduler: PrefillScheduler[Prompt] = PrefillScheduler(max_open)
    clock, order = 0, []
    while left := [prompt for prompt in prompts if prompt.layers_left]:
        clock = max(clock, left[0].arrives)  # idle until the next one arrives
        chosen = scheduler.choose([prompt for prompt in left if prompt.arrives <= clock])
        chosen.began = clock if chosen.began is None else chosen.began
        order.append(chosen)
        clock += chosen.num_tokens
        scheduler.record(chosen, chosen.num_tokens)
        chosen.layers_left -= 1
        chosen.ended = clock
        assert sum(prompt.is_open for prompt in prompts) <= max_open
    return order


def stream(num_tokens: int, load: float, until: int) -> list[Prompt]:
    """Prompts that alone keep the engine busy for a share `load` of the time."""
    every = round(LAYERS * num_tokens / load)
    return [Prompt(at, num_tokens) for at in range(1, until, every)]


@pytest.mark.parametrize("arrives", [1, LONG, 5 * LONG + 7, 20 * LONG, 23 * LONG + 1])
def test_a_short_prompt_does_not_wait_for_a_long_one_to_end(arrives: int) -> None:
    long, short = Prompt(0, LONG), Prompt(arrives, SHORT)
    run([long, short])
    assert short.waited <= LONG
    assert max(long.ended, short.ended) == long.own_work + short.own_work


def test_a_prompt_that_has_little_left_is_not_interrupted() -> None:
    long, short = Prompt(0, LONG), Prompt(23 * LONG - 1, SHORT * 40)
    run([long, short])
    assert long.waited == 0


def test_of_equally_long_prompts_each_is_computed_to_its_end() -> None:
    """Taking turns would let the first end as late as the last."""
    prompts = [Prompt(at, LONG) for at in range(4)]
    order = run(prompts)
    assert order == [prompt for prompt in prompts for _ in range(LAYERS)]


def test_of_those_that_wait_the_shortest_begins_first() -> None:
    sizes = (LONG, 4000, 1000, 2000)
    long, *others = [Prompt(at, size) for at, size in enumerate(sizes)]
    order = run([long, *others], max_open=2)
    assert list(dict.fromkeys(order)) == [long, others[1], others[2], others[0]]


@pytest.mark.parametrize("load", [0.5, 0.9, 1.0, 2.0])
def test_a_long_prompt_ends_however_many_short_ones_come(load: float) -> None:
    long = Prompt(0, LONG)
    shorts = stream(SHORT, load, until=5 * long.own_work)
    run([long, *shorts])
    assert long.waited <= PATIENCE * long.own_work + LAYERS * SHORT


def test_a_long_prompt_begins_though_short_ones_take_every_place() -> None:
    long = Prompt(0, LONG)
    shorts = [Prompt(-1, SHORT) for _ in range(8)] + stream(SHORT, 2.0, until=5 * long.own_work)
    run(sorted([long, *shorts], key=lambda prompt: prompt.arrives), max_open=1)
    assert long.began is not None
    assert long.began <= PATIENCE * LONG + LAYERS * SHORT * 9


def test_beside_an_aged_prompt_a_short_one_waits_for_a_layer_of_it_at_a_time() -> None:
    long = Prompt(0, LONG)
    shorts = stream(SHORT, 0.5, until=long.own_work)
    run([long, *shorts])
    assert max(short.waited for short in shorts) <= 2 * LONG


def test_with_one_place_a_prompt_that_has_begun_is_computed_to_its_end() -> None:
    long, short = Prompt(0, LONG), Prompt(1, SHORT)
    order = run([long, short], max_open=1)
    assert order == [long] * LAYERS + [short] * LAYERS


def test_a_prompt_whose_layers_have_not_left_is_passed_over() -> None:
    scheduler: PrefillScheduler[Prompt] = PrefillScheduler(4)
    held, other = Prompt(0, SHORT, began=0, can_go_on=False), Prompt(1, LONG)
    assert scheduler.choose([held, other]) is other
    assert scheduler.choose([held]) is held  # nobody else could use the time


def test_a_prompt_may_not_begin_in_place_of_one_that_is_held() -> None:
    scheduler: PrefillScheduler[Prompt] = PrefillScheduler(1)
    held = Prompt(0, SHORT, began=0, can_go_on=False)
    assert scheduler.choose([held, Prompt(1, SHORT)]) is held


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10_000)), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_every_prompt_ends_within_a_bound_of_its_turn(
    arrivals: list[tuple[int, int]], max_open: int
) -> None:
    """The bound: those that came before and its own work, at the share of the oldest."""
    prompts = [Prompt(arrives, size) for arrives, size in sorted(arrivals)]
    run(prompts, max_open)
    largest = max(prompt.num_tokens for prompt in prompts)
    for idx, prompt in enumerate(prompts):
        its_turn = sum(earlier.own_work for earlier in prompts[: idx + 1])
        slack = (idx + 1) * 2 * LAYERS * largest  # a layer more each time, and a place
        assert prompt.ended - prompt.arrives <= (1 + PATIENCE) * its_turn + slack
