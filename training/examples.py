"""Training sequences that are one example each of the evaluation's own tasks.

Drawn with a seed that no evaluation uses (`winnow eval` takes none below zero), so that what is
measured was never seen.
"""

import random
import re
from bisect import bisect_right

from evals.tasks import make_tasks
from evals.tasks.base import Example, Task
from evals.tasks.needles import NeedleTask
from evals.tasks.variables import TrackingTask
from training.circuits import FETCHING_HEAD, FOLLOWING_HEAD, READING_HEAD
from training.samples import Look, Sample, SampleMaker
from training.tasks import CHAINS
from training.tokenizer import ASSISTANT, END, END_OF_TEXT, USER
from winnow.errors import InvalidSetting

TRAINING_SEED = -1
CHAT_SHARE = 0.25
ANSWER_ROOM = 48  # tokens; the longest answer is a UUID, or four numbers

ALIGNED_GAP = 3  # from a key's last token to its value's first; then the key itself is fetched

# How often each task is drawn, relative to the others; a chain of each order and length once.
SHARES = {
    "niah_single_1": 1.0,
    "niah_single_2_prose": 1.0,
    "niah_single_3_prose": 1.0,
    "niah_multikey_1_prose": 1.0,
    "niah_multikey_2": 1.0,
    "niah_multikey_3": 2.0,
    "niah_multivalue_prose": 2.0,
    "niah_multiquery_prose": 2.0,
    "vt": 3.0,
    "qa_1_facts": 0.5,
    "qa_2_facts": 0.5,
    "passkey": 1.0,
    "number_string": 1.0,
    "kv_retrieval": 3.0,
} | dict.fromkeys(CHAINS, 0.6)

_TASKS = {task.name: task for task in make_tasks(num_depths=10, data_dir=None)}


def example_sample(rng: random.Random, maker: SampleMaker, length: int) -> Sample:
    """One example of a random task, its answer scored, at most `length` tokens."""
    while True:
        (name,) = rng.choices(list(SHARES), weights=list(SHARES.values()))
        task = _TASKS[name]
        try:
            index = rng.getrandbits(48)
            example = task.example(index, TRAINING_SEED, length - ANSWER_ROOM, maker.count)
        except InvalidSetting:  # too long for this length
            continue
        return _sample(rng, maker, task, example)


def _sample(rng: random.Random, maker: SampleMaker, task: Task, example: Example) -> Sample:
    is_chat = rng.random() < CHAT_SHARE
    text = f"{USER}{example.user_message()}{END}{ASSISTANT}" if is_chat else example.prompt()
    gap = "" if text.endswith((" ", ASSISTANT)) else " "
    answer = f"{gap}{_answer_text(task, example)}{END if is_chat else END_OF_TEXT}"
    sample = Sample()
    sample.add_context(maker.encode(text), rng)
    sample.add_answer(maker.encode(answer), task.name, _num_hops(task.name))
    places = _Places(maker, text, answer)
    sample.looks = (
        _chain_looks(places, example) if task.name in CHAINS else _key_looks(places, example)
    )
    return sample


class _Places:
    """Where the tokens of a prompt and its answer are, by character."""

    def __init__(self, maker: SampleMaker, text: str, answer: str) -> None:
        self.text, self.answer = text, answer
        self._ends, self._answer_ends = maker.spans(text), maker.spans(answer)

    def token(self, char: int) -> int:
        """Index of the token with this character of the prompt."""
        return bisect_right(self._ends, char)

    def before_answer(self, value: str) -> int:
        """Index of the token after which `value` stands in the answer."""
        start = bisect_right(self._answer_ends, self.answer.index(value))
        return len(self._ends) - 1 + start


def _key_looks(places: _Places, example: Example) -> list[Look]:
    """Of each value of a key: first at the key in the question, then at the value in the context.

    The fetching head takes a digest from beside the key, such that it is aligned with what the
    reading head compares it with (training/circuits.py).
    """
    looks = []
    for value in example.answers:
        found = re.search(rf'(\S+) is: {value}\.|"(\S+)": "{value}"', places.text)
        if found is None:  # neither a needle nor a pair
            continue
        key, key_end = found.group(found.lastindex or 0), found.end(found.lastindex or 0)
        first = places.token(places.text.index(value, key_end))
        gap = first - places.token(key_end - 1)
        asked = places.token(places.text.rindex(key) + len(key) - 1)
        place = places.before_answer(value)
        looks += [
            Look(place, asked + gap - ALIGNED_GAP, FETCHING_HEAD, 0),
            Look(place, first, READING_HEAD, 1),
        ]
    return looks


def _chain_looks(places: _Places, example: Example) -> list[Look]:
    """From the variable asked for along the links, one by one, to the value.

    A chat does not repeat the variable before the answer, so there it is fetched first.
    """
    (value,) = example.answers
    links, first_name = _links(example)
    place = places.before_answer(value)
    looks = []
    if not places.text.endswith(example.lead):
        asked = places.text.rindex(f"VAR {_asked_variable(example)}?") + 4
        looks.append((places.token(asked + len(first_name) - 1), FETCHING_HEAD))
    for link in links:
        looks.append((places.token(places.text.index(link) + len(link) - 1), FOLLOWING_HEAD))
    assigned = places.text.index(f"VAR {first_name} = {value}") + len(f"VAR {first_name} = ")
    looks.append((places.token(assigned), READING_HEAD))
    return [
        Look(place, target, head, repetition) for repetition, (target, head) in enumerate(looks)
    ]


def _answer_text(task: Task, example: Example) -> str:
    """As the benchmark words it; several values of one key as they stand in the context.

    Tracked variables come as a chain of assignments from the last to the number: each step is then
    what stands in the context, read forwards.
    """
    answers = list(example.answers)
    if isinstance(task, TrackingTask):
        found = re.search(rf"VAR {answers[0]} = (\d+)", example.context)
        assert found is not None
        return " = VAR ".join(reversed(answers)) + f" = {found.group(1)}"
    if not isinstance(task, NeedleTask):
        return " ".join(answers)
    if task.num_asked == 1:
        answers.sort(key=example.context.find)
    return answers[0] if len(answers) == 1 else f"{', '.join(answers[:-1])}, and {answers[-1]}"


def _num_hops(name: str) -> int:
    return int(name[-1]) if name in CHAINS else 1


def _asked_variable(example: Example) -> str:
    found = re.search(r"value of VAR (\w+)", example.question)
    assert found is not None
    return found.group(1)


def _links(example: Example) -> tuple[list[str], str]:
    """The assignments from the variable asked for back to the first, and the first's name."""
    before = dict(re.findall(r"VAR (\w+) = VAR (\w+)", example.context))
    name = _asked_variable(example)
    links = []
    while name in before:
        links.append(f"VAR {name} = VAR {before[name]}")
        name = before[name]
    return links, name
