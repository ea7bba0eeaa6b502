"""Training sequences that are one example each of the evaluation's own tasks.

Drawn with a seed that no evaluation uses (`winnow eval` takes none below zero), so that what is
measured was never seen.
"""

import random
import re
from bisect import bisect_right
from collections.abc import Sequence

from evals.tasks import make_tasks
from evals.tasks.base import Example, Task
from evals.tasks.needles import NeedleTask
from evals.tasks.variables import TrackingTask
from training.circuits import FETCHING_HEAD, READING_HEAD
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
    links = [] if is_chat else _links(example)
    sample.add_answer(
        maker.encode(answer), task.name, _num_hops(task.name), [maker.encode(x) for x in links]
    )
    sample.looks += _lookups(maker, text, answer, example)
    return sample


def _lookups(maker: SampleMaker, text: str, answer: str, example: Example) -> list[Look]:
    """Of each value of a key: first at the key in the question, then at the value in the context.

    The fetching head takes a digest from beside the key, such that it is aligned with what the
    reading head compares it with (training/circuits.py).
    """
    starts, ends = maker.spans(text), maker.spans(answer)
    looks = []
    for value in example.answers:
        found = re.search(rf'(\S+) is: {value}\.|"(\S+)": "{value}"', text)
        if found is None:  # neither a needle nor a pair
            continue
        key, key_end = found.group(found.lastindex or 0), found.end(found.lastindex or 0)
        first = _token_at(starts, text.index(value, key_end))
        gap = first - _token_at(starts, key_end - 1)
        place = len(starts) - 1 + _token_at(ends, answer.index(value))
        fetched = _token_at(starts, text.rindex(key) + len(key) - 1) + gap - ALIGNED_GAP
        looks += [Look(place, fetched, FETCHING_HEAD, 0), Look(place, first, READING_HEAD, 1)]
    return looks


def _token_at(ends: Sequence[int], char: int) -> int:
    """Index of the token that holds a character; ends: of each token, the character after it."""
    return bisect_right(ends, char)


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


def _links(example: Example) -> list[str]:
    """The assignments from the chain's last variable back to its first, as they are written."""
    if example.task not in CHAINS:
        return []
    before = dict(re.findall(r"VAR (\w+) = VAR (\w+)", example.context))
    found = re.search(r"value of VAR (\w+)", example.question)
    name = found.group(1) if found else None
    links = []
    while name in before:
        links.append(f"{name} = VAR {before[name]}")
        name = before[name]
    return links
