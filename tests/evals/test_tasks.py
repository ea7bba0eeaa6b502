"""Every task: the length bound, seeds, and that the text holds what the answer needs."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from uuid import UUID

import pytest

from evals.tasks import make_tasks
from evals.tasks.base import CountTokens, Example, Task
from evals.tasks.counting import zeta_frequencies
from evals.tasks.infinitebench import digit_string
from tests.evals.tokenizers_in_code import counter, line_break_joining, prefix_adding
from winnow.errors import InvalidSetting
from winnow.tokenizer import load_tokenizer

TASKS = {task.name: task for task in make_tasks(11, None)}
RULER = (
    *("niah_single_1", "niah_single_2_prose", "niah_single_3_prose"),
    *("niah_multikey_1_prose", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue_prose", "niah_multiquery_prose"),
    *("vt", "cwe", "fwe", "qa_1_facts", "qa_2_facts"),
)
# Tokens that a prompt may lack: the longest piece of context of most tasks, and of documents.
SLACK, DOCUMENT_SLACK = 130, 350


@cache
def tiny() -> CountTokens:
    tokenizer = load_tokenizer(Path("models/winnow-tiny"))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


COUNTERS: dict[str, Callable[[], Callable[[str], int]]] = {
    "winnow-tiny": tiny,
    "line breaks join punctuation": cache(lambda: counter(line_break_joining())),
    "texts get a blank in front": cache(lambda: counter(prefix_adding())),
    "characters": lambda: len,
}


def example_of(name: str, index: int = 0, seed: int = 0, length: int = 2048) -> Example:
    return TASKS[name].example(index, seed, length, tiny())


def test_groups_hold_the_benchmarks_tasks() -> None:
    groups: dict[str, list[str]] = {}
    for task in TASKS.values():
        groups.setdefault(task.group, []).append(task.name)
    assert groups["ruler"] == list(RULER)
    assert groups["infinitebench"] == ["passkey", "number_string", "kv_retrieval", "math_find"]
    assert groups["niah"] == ["niah"]
    assert groups["chains"] == [
        f"chain_{order}_{hops}" for order in ("ordered", "shuffled") for hops in range(1, 7)
    ]
    assert groups["zero_shot"] == ["vt_zero_shot"]


@pytest.mark.parametrize("tokenizer", COUNTERS)
@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_as_long_as_asked_for_but_no_longer(name: str, tokenizer: str) -> None:
    count = COUNTERS[tokenizer]()
    unit = 4 if tokenizer == "characters" else 1
    slack = (DOCUMENT_SLACK if name.startswith("qa") else SLACK) * unit
    for length in (2048 * unit, 3000 * unit):
        for index in range(3):
            example = TASKS[name].example(index, 0, length, count)
            assert length - slack <= count(example.prompt()) <= length


@pytest.mark.parametrize("name", TASKS)
def test_an_example_is_a_function_of_seed_length_and_index(name: str) -> None:
    task = TASKS[name]
    assert task.example(3, 1, 1100, tiny()) == task.example(3, 1, 1100, tiny())
    others = [
        task.example(index, seed, length, tiny()).context
        for index, seed, length in ((3, 1, 1100), (4, 1, 1100), (3, 2, 1100), (3, 1, 1101))
    ]
    assert len(set(others)) == 4


@pytest.mark.parametrize("name", TASKS)
def test_examples_leave_the_global_generator_alone(name: str) -> None:
    random.seed(0)
    before = random.getstate()
    example_of(name, length=1100)
    assert random.getstate() == before


@pytest.mark.parametrize("name", TASKS)
def test_no_field_stays_unfilled(name: str) -> None:
    example = example_of(name, length=1100)
    around = example.opening + example.question + example.lead
    assert not re.search(r"\{\w*\}", around)
    assert example.prompt().startswith(example.user_message())
    assert example.prompt() == example.user_message() + example.lead
    assert example.max_new_tokens == TASKS[name].max_new_tokens
    assert (example.task, example.index) == (name, 0)


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_itself_scores_one_and_fits_the_new_tokens(name: str) -> None:
    example = example_of(name)
    answer = " ".join(example.answers)
    assert TASKS[name].metric(answer, example.answers) == 1
    assert TASKS[name].metric("", example.answers) == 0
    assert tiny()(f" {answer}") <= example.max_new_tokens


@pytest.mark.parametrize("name", [name for name in TASKS if name != "math_find"])
def test_the_context_holds_every_answer(name: str) -> None:
    for index in range(5):
        example = example_of(name, index, length=1100)
        assert all(answer in example.context for answer in example.answers)


@pytest.mark.parametrize("name", TASKS)
def test_refuses_a_length_without_room_for_the_task(name: str) -> None:
    with pytest.raises(InvalidSetting, match=f"task {name} needs at least [0-9,]+ prompt tokens"):
        TASKS[name].example(0, 0, 20, tiny())


NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")


def needles_of(example: Example) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for _, key, value in NEEDLE.findall(example.context):
        found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize(
    ("name", "num_keys", "num_values", "num_asked"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2_prose", 1, 1, 1),
        ("niah_single_3_prose", 1, 1, 1),
        ("niah_multikey_1_prose", 4, 1, 1),
        ("niah_multivalue_prose", 1, 4, 1),
        ("niah_multiquery_prose", 4, 1, 4),
        ("niah", 1, 1, 1),
    ],
)
def test_needles_are_as_many_as_rulers(
    name: str, num_keys: int, num_values: int, num_asked: int
) -> None:
    example = example_of(name)
    needles = needles_of(example)
    assert [len(values) for values in needles.values()] == [num_values] * num_keys
    asked = [key for key in needles if key in example.question]
    assert len(asked) == num_asked
    assert {value for key in asked for value in needles[key]} == set(example.answers)


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_answers_its_key_once(name: str) -> None:
    example = example_of(name)
    needles = needles_of(example)
    assert len(example.context.splitlines()) == sum(map(len, needles.values())) > 20
    (asked,) = (key for key in needles if f" {key} " in example.question)
    assert tuple(needles[asked]) == example.answers


def test_values_are_seven_digits_or_random_uuids() -> None:
    (number,) = example_of("niah_single_2_prose").answers
    assert re.fullmatch(r"[1-9]\d{6}", number)
    for name in ("niah_single_3_prose", "niah_multikey_3", "kv_retrieval"):
        (uuid,) = example_of(name).answers
        assert UUID(uuid).version == 4
        assert str(UUID(uuid)) == uuid


def test_one_needle_is_asked_for_in_rulers_words() -> None:
    example = example_of("niah_single_3_prose")
    (key,) = needles_of(example)
    assert example.opening == (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards.\n"
    )
    assert example.question + example.lead == (
        f"\nWhat is the special magic uuid for {key} mentioned in the provided text?"
        f" The special magic uuid for {key} mentioned in the provided text is"
    )


def test_many_needles_are_asked_for_in_rulers_words() -> None:
    example = example_of("niah_multiquery_prose")
    assert example.opening.startswith("Some special magic numbers are hidden within the following")
    query = r"\S+-\S+, \S+-\S+, \S+-\S+, and \S+-\S+"
    assert re.fullmatch(
        rf"\nWhat are all the special magic numbers for {query} mentioned in the provided text\?",
        example.question,
    )
    assert re.fullmatch(
        rf" The special magic numbers for {query} mentioned in the provided text are",
        example.lead,
    )


def test_noise_stands_line_by_line() -> None:
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back"
    for name in ("niah_single_1", "passkey", "number_string", "vt", "chain_shuffled_2"):
        lines = example_of(name).context.splitlines()
        others = [line for line in lines if line != f"{noise} again."]
        assert 1 <= len(others) <= 8 < len(lines) - len(others)


def test_prose_hardly_repeats_itself() -> None:
    sentences: Counter[str] = Counter()
    for index in range(20):
        sentences.update(re.split(r"(?<=[.!?]) ", example_of("niah_single_2_prose", index).context))
    assert len(sentences) > 0.8 * sentences.total()


def test_the_needle_goes_through_all_depths() -> None:
    examples = [TASKS["niah"].example(index, 0, 2048, tiny()) for index in range(12)]
    assert [example.depth for example in examples] == [*(i / 10 for i in range(11)), 0.0]
    for example in examples:
        place = NEEDLE.search(example.context)
        assert place is not None
        share = place.start() / (len(example.context) - len(place[0]))
        assert share == pytest.approx(example.depth, abs=0.08)
    assert examples[0].context.startswith("One of the special magic")
    assert examples[10].context.endswith(f"{examples[10].answers[0]}.")


def test_one_depth_is_the_beginning() -> None:
    task = next(task for task in make_tasks(1, None) if task.name == "niah")
    assert [task.example(i, 0, 1024, tiny()).depth for i in range(2)] == [0.0, 0.0]


def test_tracked_variables_are_assigned_in_order() -> None:
    example = example_of("vt")
    links = re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?(\S+)$", example.context, re.MULTILINE)
    assert tuple(name for name, _ in links) == example.answers
    assert len(set(example.answers)) == 5
    values = [value for _, value in links]
    assert values[1:] == list(example.answers[:-1])
    assert f"assigned the value {values[0]} in" in example.question
    assert f" 5 variables are assigned the value {values[0]}, they are: " in example.lead


def test_the_benchmarks_worked_example_comes_first() -> None:
    example = example_of("vt")
    worked, _, rest = example.opening.rpartition("\n\n\n\n")[0].partition("they are: ")
    assert tiny()(worked) <= 500
    assert re.findall(r"VAR ([A-Z]{3}) =", worked) == rest.split()
    assert example.opening.count("Memorize and track") == 2
    assert example_of("vt_zero_shot").opening.count("Memorize and track") == 1


@pytest.mark.parametrize("hops", range(1, 7))
@pytest.mark.parametrize("order", ["ordered", "shuffled"])
def test_a_chain_leads_from_the_question_to_the_answer(order: str, hops: int) -> None:
    example = example_of(f"chain_{order}_{hops}")
    links = re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?(\S+)\.$", example.context, re.MULTILINE)
    assert len(links) == 4 * hops
    assigned = dict(links)
    asked = re.search(r"value of VAR ([A-Z]{5})\?", example.question)
    assert asked is not None
    trail = [asked[1]]
    while trail[-1] in assigned:
        trail.append(assigned[trail[-1]])
    assert len(trail) == hops + 1
    assert (trail[-1],) == example.answers
    assert trail[0] not in assigned.values()


@pytest.mark.parametrize("order", ["ordered", "shuffled"])
def test_links_stand_in_order_or_not(order: str) -> None:
    def is_in_order(index: int) -> bool:
        context = example_of(f"chain_{order}_6", index).context
        places = {
            name: context.index(f"VAR {name} =") for name in re.findall("VAR (.*) =", context)
        }
        links = re.findall(r"VAR (.*) = VAR (.*)\.", context)
        return all(places[source] < places[name] for name, source in links)

    assert {is_in_order(index) for index in range(5)} == {order == "ordered"}


def test_common_words_stand_more_often_than_others() -> None:
    for length, repeats in ((2048, (6, 1)), (4096, (30, 3))):
        example = example_of("cwe", length=length)
        words = re.findall(r"(\d+)\. (\S+)", example.context)
        assert [int(number) for number, _ in words] == list(range(1, len(words) + 1))
        frequencies = Counter(word for _, word in words)
        assert {frequencies.pop(word) for word in example.answers} == {repeats[0]}
        assert set(frequencies.values()) == {repeats[1]}


def test_common_words_are_repeated_less_where_a_word_takes_many_tokens() -> None:
    example = TASKS["cwe"].example(0, 0, 4400, len)
    frequencies = Counter(re.findall(r"\d+\. (\S+)", example.context))
    assert set(frequencies.values()) == {6, 1}


def test_common_words_come_with_an_answered_example() -> None:
    opening = example_of("cwe").opening
    listed, _, answer = opening.partition("often in the list are: ")
    words = Counter(re.findall(r"\d+\. (\S+)", listed))
    common = re.findall(r"\d+\. (\S+)", answer.splitlines()[0])
    assert sorted(common) == sorted(word for word, n in words.items() if n == 3)
    assert len(common) == 10
    assert opening.count("Below is a numbered list of words.") == 2


@pytest.mark.parametrize("length", [300, 1024, 4096])
def test_frequent_words_are_the_three_after_the_dots(length: int) -> None:
    example = example_of("fwe", length=length)
    frequencies = Counter(example.context.split())
    ranked = frequencies.most_common()
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == example.answers
    assert all(ranked[3][1] > times for _, times in ranked[4:])
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])


def test_zeta_frequencies_by_hand() -> None:
    assert zeta_frequencies(1000, 5) == [607, 151, 67, 37, 24]


@pytest.mark.parametrize(("name", "num_hops"), [("qa_1_facts", 1), ("qa_2_facts", 2)])
def test_facts_lead_to_the_answer(name: str, num_hops: int) -> None:
    example = example_of(name)
    context = example.context
    documents = re.findall(r"^Document (\d+):$", context, re.MULTILINE)
    assert [int(number) for number in documents] == list(range(1, len(documents) + 1))
    city = dict(re.findall(r"(\w+ \w+) lives in (\w+)\.", context))
    employer = dict(re.findall(r"(\w+ \w+) works for (\w+ \w+)\.", context))
    assert len(city) == len(documents)
    asked = re.search(r"does (\w+ \w+) live\?|whom (\w+ \w+) works\?", example.question)
    assert asked is not None
    person = asked[1] if num_hops == 1 else employer[asked[2]]
    assert (city[person],) == example.answers


def test_a_pass_key_is_said_twice() -> None:
    example = example_of("passkey")
    (key,) = example.answers
    assert re.fullmatch(r"\d{5}", key)
    statement = f"The pass key is {key}. Remember it. {key} is the pass key."
    assert statement in example.context.splitlines()


def test_number_strings_are_five_digits_of_which_some_are_doubled() -> None:
    """Runs of ten digits arise from at most five: there are at most five runs."""
    for seed in range(200):
        digits = digit_string(random.Random(seed))
        assert re.fullmatch(r"\d{10}", digits)
        assert len(re.findall(r"(\d)\1*", digits)) <= 5


def test_keys_and_values_are_one_json_object() -> None:
    example = example_of("kv_retrieval")
    pairs = json.loads(example.context)
    asked = re.search(r'Key: "(.*)"', example.question)
    assert asked is not None
    assert (pairs[asked[1]],) == example.answers
    assert len(pairs) > 10


@pytest.mark.parametrize(
    "name", ["niah_single_1", "niah_single_2_prose", "kv_retrieval", "passkey"]
)
def test_answers_stand_anywhere(name: str) -> None:
    shares = []
    for index in range(40):
        example = example_of(name, index, length=1024)
        shares.append(example.context.index(example.answers[0]) / len(example.context))
    assert min(shares) < 0.15
    assert max(shares) > 0.85


def statistic(what: str, numbers: list[int]) -> float:
    """By counting: how many distinct numbers, or how many numbers, lie above and below."""
    if what == "median":
        ranked = sorted(numbers)
        return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
    rank = {"second": 1, "third": 2}.get(what.partition(" ")[0], 0)
    distinct = sorted(set(numbers), reverse="largest" in what)
    return distinct[rank]


def test_numbers_are_found_by_what_is_asked() -> None:
    asked_for = set()
    for index in range(60):
        example = example_of("math_find", index, length=600)
        found = re.fullmatch(
            r"What is the (.*) number in the following list\?\n\n", example.opening
        )
        assert found is not None
        assert example.lead == f" The {found[1]} number of the list is: "
        numbers = json.loads(example.context)
        assert 0 <= min(numbers) <= max(numbers) <= 99
        assert float(example.answers[0]) == statistic(found[1], numbers)
        asked_for.add(found[1])
    assert len(asked_for) == 7


def test_task_names_are_unique() -> None:
    tasks: list[Task] = make_tasks(11, None)
    assert len({task.name for task in tasks}) == len(tasks) == len(TASKS)
