"""The decision which replica a prompt goes to."""

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.prefill.order import Load, best_first

N = 8_000
IDLE = Load(0, ())
FIRSTS = 200  # decisions; by chance alone all of them are the same once in 2^199


def firsts(num_tokens: int, *loads: Load) -> set[int]:
    """All replicas that come first in many decisions."""
    return {best_first(num_tokens, loads)[0] for _ in range(FIRSTS)}


loads = st.lists(
    st.builds(Load, st.integers(0, N), st.lists(st.integers(1, 2 * N), max_size=5)),
    max_size=6,
)


@given(loads=loads, num_tokens=st.integers(1, N))
def test_every_replica_is_in_the_order_once(loads: list[Load], num_tokens: int) -> None:
    assert sorted(best_first(num_tokens, loads)) == list(range(len(loads)))


@given(loads=loads.filter(bool), num_tokens=st.integers(1, N))
def test_the_first_costs_hardly_more_than_the_cheapest(loads: list[Load], num_tokens: int) -> None:
    costs = [load.cost(num_tokens) for load in loads]
    order = best_first(num_tokens, loads)
    assert costs[order[0]] <= min(costs) + num_tokens / 10
    others = [costs[idx] for idx in order if costs[idx] > min(costs) + num_tokens / 10]
    assert others == sorted(others)


@given(work=st.lists(st.integers(1, N), max_size=5), more=st.lists(st.integers(1, N), min_size=1))
def test_more_work_or_less_held_never_costs_less(work: list[int], more: list[int]) -> None:
    load = Load(4_000, work)
    assert Load(4_000, [*work, *more]).cost(N) > load.cost(N)
    assert Load(3_999, work).cost(N) > load.cost(N)


def test_a_prompt_goes_to_the_replica_that_holds_the_most_of_it() -> None:
    assert best_first(N, [IDLE, Load(7_000, ()), Load(3_000, ())]) == [1, 2, 0]


def test_without_any_knowledge_prompts_are_spread() -> None:
    assert firsts(N, IDLE, IDLE, IDLE) == {0, 1, 2}


def test_what_nobody_holds_goes_to_the_least_loaded() -> None:
    assert firsts(N, Load(0, (N, N)), Load(0, (N,)), Load(0, (N, N, N))) == {1}


def test_equal_holders_share_the_work() -> None:
    assert firsts(N, Load(7_900, ()), Load(7_900, ()), IDLE) == {0, 1}
    assert firsts(N, Load(7_900, (100,)), Load(7_900, ()), IDLE) == {1}


def test_a_follow_up_stays_where_long_prompts_are_computed_since_it_goes_before_them() -> None:
    assert firsts(N, Load(7_900, (N, N, N)), IDLE) == {0}


def test_many_questions_about_one_document_spill_over() -> None:
    """The 100 tokens of the 80th are computed after 79 others': elsewhere 8,000 end sooner."""
    assert firsts(N, Load(7_900, [100] * 60), IDLE) == {0}
    assert firsts(N, Load(7_900, [100] * 80), IDLE) == {1}


def test_a_short_beginning_that_all_prompts_share_does_not_draw_them_together() -> None:
    assert firsts(N, Load(256, ()), IDLE) == {0, 1}
    assert firsts(N, Load(256, (N,)), IDLE) == {1}


def test_a_prompt_held_to_its_end_still_counts_one_token() -> None:
    assert Load(128, ()).cost(128) == 1
