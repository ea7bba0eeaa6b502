"""Attention targets: where heads must look to find an answer, derived from a sequence's text.

A key's value is found in two look-ups: the key in the question, then the value that follows the key
in the context. A variable's value is found link by link. See training/circuits.py for the heads.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass

from training.circuits import FETCHING_HEAD, FOLLOWING_HEAD, READING_HEAD
from training.tasks import CHAINS

DECIDING_TOKENS = 4  # first tokens of a value, before which other values may begin alike
TRACKING = "vt_zero_shot"
LATER_STRIDE = 3  # of the tokens after those, every third is supervised
LAST_NAME_REPETITION = 2
ALIGNED_GAP = 3  # tokens from a key's last to its value's first at which the key itself is fetched


@dataclass(frozen=True)
class Look:
    """An attention target: from the token at `place` to the one at `target`.

    repetition: of the shared layer, from 0.
    """

    place: int
    target: int
    head: int
    repetition: int


@dataclass(frozen=True)
class Asked:
    """One question in a text with known tokens.

    ends: for each token, the index of the character after its last.
    question, answer: index of the first character of the question and of its answer.
    """

    text: str
    ends: list[int]
    question: int
    answer: int

    def token(self, char: int) -> int:
        """Index of the token that contains this character."""
        return bisect_right(self.ends, char)

    def before(self, value: str) -> int:
        """Index of the token right before `value` in the answer."""
        return self.token(self.text.index(value, self.answer)) - 1

    @property
    def words(self) -> str:
        """The question, with the beginning of its answer if there is one."""
        return self.text[self.question : self.answer]


def looks_for(asked: Asked, kind: str, values: tuple[str, ...]) -> list[Look]:
    """Attention targets that lead to the `values` a question of this kind asks for."""
    if kind == TRACKING:
        return last_name_looks(asked, values[-1])
    return chain_looks(asked, values[0]) if kind in CHAINS else key_looks(asked, values)


def key_looks(asked: Asked, values: tuple[str, ...]) -> list[Look]:
    """For each token of each value: first its key in the question, then the token itself.

    Targets for the first token are not enough: if many values begin alike, the tokens so far do not
    determine which one to continue. Later tokens are found by the tokens before them.
    The fetching head takes a digest from beside the key, so that it is aligned with what the
    reading head compares it with. Values that are neither needles nor pairs have no targets.
    """
    looks = []
    for value in values:
        escaped, context = re.escape(value), asked.text[: asked.question]
        found = re.search(rf'(\S+) is: {escaped}\.|"(\S+)": "{escaped}"', context)
        if found is None:
            continue
        key, key_end = found.group(found.lastindex or 0), found.end(found.lastindex or 0)
        gap = asked.token(context.index(value, key_end)) - asked.token(key_end - 1)
        mention = asked.token(asked.question + asked.words.rindex(key) + len(key) - 1)
        for i, (place, target) in enumerate(_copied(asked, context.index(value, key_end), value)):
            if i < DECIDING_TOKENS:
                beside = mention + gap + i - ALIGNED_GAP
                looks += [
                    Look(place, beside, FETCHING_HEAD, 0),
                    Look(place, target, READING_HEAD, 1),
                ]
            elif i % LATER_STRIDE == 0:
                looks.append(Look(place, target, READING_HEAD, 0))
    return looks


def last_name_looks(asked: Asked, name: str) -> list[Look]:
    """Targets at `name`, assigned last, with which the answer of a tracking task begins."""
    context = asked.text[: asked.question]
    copied = _copied(asked, context.index(f"VAR {name} = ") + len("VAR "), name)
    return [Look(place, target, READING_HEAD, LAST_NAME_REPETITION) for place, target in copied]


def _copied(asked: Asked, start: int, value: str) -> list[tuple[int, int]]:
    """For each token of `value` in the answer: the place before it, and its token in the context.

    start: index of the value's first character in the context.
    """
    said = asked.text.index(value, asked.answer)
    pairs = []
    for i in range(len(value)):
        target, place = asked.token(start) + i, asked.token(said) + i - 1
        ends = (asked.ends[target] - start, asked.ends[place + 1] - said)
        if ends[0] != ends[1] or ends[0] > len(value):
            break
        pairs.append((place, target))
    return pairs


def chain_looks(asked: Asked, value: str) -> list[Look]:
    """Targets from the variable asked for along the links, one by one, to the value.

    If the variable is not repeated right before the answer, it is fetched first.
    """
    context = asked.text[: asked.question]
    before = dict(re.findall(r"VAR (\w+) = VAR (\w+)", context))
    *_, mention = re.finditer(r"VAR (\w+)", asked.words)
    name = mention.group(1)
    targets = []
    if not asked.words.endswith(f"VAR {name} = "):
        targets.append((asked.question + mention.end() - 1, FETCHING_HEAD))
    while name in before:
        link = f"VAR {name} = VAR {before[name]}"
        targets.append((context.index(link) + len(link) - 1, FOLLOWING_HEAD))
        name = before[name]
    assigned = f"VAR {name} = "
    targets.append((context.index(f"{assigned}{value}") + len(assigned), READING_HEAD))
    place = asked.before(value)
    return [
        Look(place, asked.token(target), head, repetition)
        for repetition, (target, head) in enumerate(targets)
    ]
