import pytest

from evals.turns.conversation import conversation
from winnow.errors import InvalidSetting


def count(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("num_turns", [1, 2, 7])
def test_every_turn_asks_the_same_document_for_another_number_in_it(num_turns: int) -> None:
    turns = conversation(0, 0, 400, num_turns, count)
    assert len(turns) == num_turns
    assert len({(turn.opening, turn.context) for turn in turns}) == 1
    answers = [answer for turn in turns for answer in turn.answers]
    assert len(set(answers)) == len({turn.question for turn in turns}) == num_turns
    assert all(answer in turns[0].context for answer in answers)
    assert all(300 < count(turn.prompt()) <= 400 for turn in turns)


def test_conversations_are_the_same_each_time_and_differ_by_index() -> None:
    assert conversation(1, 0, 400, 3, count) == conversation(1, 0, 400, 3, count)
    assert conversation(1, 0, 400, 3, count) != conversation(2, 0, 400, 3, count)


def test_refuses_a_length_that_the_questions_do_not_fit() -> None:
    with pytest.raises(InvalidSetting, match=r"needs at least .* there is room for 60"):
        conversation(0, 0, 60, 8, count)
