"""Training sequences that are each one example of the evaluation's own tasks.

They are drawn with a seed that no evaluation uses (`winnow eval` accepts none below zero), so
evaluation never measures an example seen in training.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from evals.tasks import make_tasks
from evals.tasks.base import Example, Task
from evals.tasks.needles import NeedleTask, listed
from evals.tasks.variables import TrackingTask
from training.looks import Asked, looks_for
from training.samples import Sample, SampleMaker, joined
from training.tasks import CHAINS
from training.tokenizer import ASSISTANT, END, END_OF_TEXT, USER
from winnow.errors import InvalidSetting

TRAINING_SEED = -1
CHAT_SHARE = 0.25
LOOKALIKES = 6  # pieces of each UUID asked for that are copied elsewhere into the context
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
ANSWER_ROOM = 48  # tokens; the longest answer is a UUID, or four numbers

# Relative frequency of each task; chains have one entry per order and length.
SHARES = {
    "niah_single_1": 1.0,
    "niah_single_2_prose": 1.0,
    "niah_single_3_prose": 1.0,
    "niah_multikey_1_prose": 1.0,
    "niah_multikey_2": 2.0,
    "niah_multikey_3": 2.0,
    "niah_multivalue_prose": 2.0,
    "niah_multiquery_prose": 2.0,
    "vt_zero_shot": 3.0,
    "qa_1_facts": 0.5,
    "qa_2_facts": 0.5,
    "passkey": 1.0,
    "number_string": 1.0,
    "kv_retrieval": 3.0,
} | dict.fromkeys(CHAINS, 0.6)

_TASKS = {task.name: task for task in make_tasks(num_depths=10, data_dir=None)}


def example_sample(
    rng: random.Random, maker: SampleMaker, length: int, tasks: Sequence[str] = ()
) -> Sample:
    """One example of one of `tasks` (empty: any) with a scored answer, at most `length` tokens.

    Half of those with UUIDs have look-alikes.
    """
    names = tasks or tuple(SHARES)
    while True:
        (name,) = rng.choices(names, weights=[SHARES[name] for name in names])
        task = _TASKS[name]
        try:
            index = rng.getrandbits(48)
            example = task.example(index, TRAINING_SEED, length - ANSWER_ROOM, maker.count)
        except InvalidSetting:  # too long for this length
            continue
        if rng.random() < 0.5:
            example = with_lookalikes(rng, example)
        return _sample(rng, maker, task, example)


def with_lookalikes(rng: random.Random, example: Example) -> Example:
    """Make other UUIDs of the context share pieces with the one asked for, and with its key.

    Random UUIDs seldom share more than four characters, so a model that distinguishes them by so
    few is nearly always right, and learns no better.
    """
    text = list(example.context)
    wanted = {*_UUID.findall(example.question), *_UUID.findall(" ".join(example.answers))}
    found = list(_UUID.finditer(example.context))
    others = [match.start() for match in found if match.group() not in wanted]
    for uuid in sorted(wanted) * LOOKALIKES if others else ():
        size = rng.randint(3, 9)
        first = rng.randrange(len(uuid) - size)
        at = rng.choice(others) + first
        text[at : at + size] = uuid[first : first + size]
    return replace(example, context="".join(text))


def _sample(rng: random.Random, maker: SampleMaker, task: Task, example: Example) -> Sample:
    is_chat = rng.random() < CHAT_SHARE
    text = f"{USER}{example.user_message()}{END}{ASSISTANT}" if is_chat else example.prompt()
    gap = "" if text.endswith((" ", ASSISTANT)) else " "
    answer = f"{gap}{_answer_text(task, example)}{END if is_chat else END_OF_TEXT}"
    prompt, answered = maker.located(text), maker.located(answer)
    sample = Sample()
    sample.add_context(prompt.tokens, rng)
    sample.add_answer(answered.tokens, task.name, _num_hops(task.name))
    whole, (_, answer_start) = joined((prompt, answered))
    question = text.index(example.context) + len(example.context)
    asked = Asked(whole.text, whole.ends, question, answer_start)
    sample.looks = looks_for(asked, task.name, example.answers)
    return sample


def _answer_text(task: Task, example: Example) -> str:
    """The answer as the benchmark words it; several values of one key in context order.

    Tracked variables are a chain of assignments from the last one to the number, so that each step
    occurs in the context, read forwards.
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
    return listed(answers)


def _num_hops(name: str) -> int:
    return int(name[-1]) if name in CHAINS else 1
