import pytest

from evals.plan import Plan, choose_tasks, parse_budgets, parse_lengths
from evals.tasks import make_tasks
from evals.variants import make_variants, parse_methods
from winnow.errors import InvalidSetting

KNOWN = make_tasks(11, None)


def names(text: str) -> list[str]:
    return [task.name for task in choose_tasks(text, KNOWN)]


def test_lengths_and_budgets_are_numbers_in_order() -> None:
    assert parse_lengths("2k, 1K,1000,2048") == (1000, 1024, 2048)
    assert parse_budgets("256,64,64") == (64, 256)


@pytest.mark.parametrize("text", ["", "k", "1.5k", "-2", "0", "2k tokens", "1,x"])
def test_refuses_what_is_no_length(text: str) -> None:
    with pytest.raises(InvalidSetting, match="--length"):
        parse_lengths(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1k", "64,many"])
def test_refuses_what_is_no_budget(text: str) -> None:
    with pytest.raises(InvalidSetting, match="--budget"):
        parse_budgets(text)


def test_tasks_by_name_group_and_pattern_each_once() -> None:
    infinitebench = [task.name for task in KNOWN if task.group == "infinitebench"]
    assert len(infinitebench) == 4
    assert names("infinitebench,passkey") == infinitebench
    assert names("passkey,vt") == ["vt", "passkey"]  # in the order of the list of tasks
    assert names("chain_ordered_*") == [f"chain_ordered_{hops}" for hops in range(1, 7)]
    assert len(names("*")) == len(KNOWN)


def test_a_task_that_matches_nothing_gets_the_list_of_the_known() -> None:
    with pytest.raises(InvalidSetting, match=r"groups ruler, .* and the tasks .*niah_multikey_3"):
        choose_tasks("vt,niah_x*", KNOWN)


def test_a_place_comes_before_the_next_sample_of_any() -> None:
    plan = Plan(
        tasks=choose_tasks("vt,passkey", KNOWN),
        lengths=(512, 1024),
        variants=make_variants(parse_methods("full,asl"), (64, 128)),
        num_samples=2,
        seed=0,
        chat=False,
        depths=11,
        data_dir=None,
    )
    places = [(index, length, task.name) for index, length, task in plan.places()]
    assert places[:4] == [
        (0, 512, "vt"),
        (0, 512, "passkey"),
        (0, 1024, "vt"),
        (0, 1024, "passkey"),
    ]
    assert len(places) * len(plan.variants) == len(plan.keys()) == 2 * 2 * 2 * 3
