"""Where heads must look so that an answer is found: derived from the text of a sequence.

A value of a key is found in two look-ups: the key in the question, then the value that follows the
key in the context. The value of a variable is found link by link. See training/circuits.py for the
heads.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass

from training.circuits import FETCHING_HEAD, FOLLOWING_HEAD, READING_HEAD
from training.tasks import CHAINS

DECIDING_TOKENS = 4  # of a value: those before which others may begin alike
TRACKING = "vt_zero_shot"
LATER_STRIDE = 3  # of the tokens after those, every third is enough
LAST_NAME_REPETITION = 2
ALIGNED_GAP = 3  # from a key's last token to its value's first; then the key itself is fetched


@dataclass(frozen=True)
class Look:
    """Where a head must look: from the token at `place` to the one at `target`.

    repetition: of the shared layer, from 0.
    """

    place: int
    target: int
    head: int
    repetition: int


@dataclass(frozen=True)
class Asked:
    """One question in a text of which the tokens are known.

    ends: of each token, the character after its last.
    question, answer: the characters with which the question and its answer begin.
    """

    text: str
    ends: list[int]
    question: int
    answer: int

    def token(self, char: int) -> int:
        """Index of the token with this character."""
        return bisect_right(self.ends, char)

    def before(self, value: str) -> int:
        """Index of the token after which `value` stands in the answer."""
        return self.token(self.text.index(value, self.answer)) - 1

    @property
    def words(self) -> str:
        """The question, with the beginning of its answer if it has one."""
        return self.text[self.question : self.answer]


def looks_for(asked: Asked, kind: str, values: tuple[str, ...]) -> list[Look]:
    """What leads to the `values` that a question of this kind asks for."""
    if kind == TRACKING:
        return last_name_looks(asked, values[-1])
    return chain_looks(asked, values[0]) if kind in CHAINS else key_looks(asked, values)


def key_looks(asked: Asked, values: tuple[str, ...]) -> list[Look]:
    """Of each value's tokens: first at its key in the question, then at the token itself.

    The first token alone is not enough: where many values begin alike, what was said so far does
    not tell which of them to go on with. Later ones are found by the tokens before them.
    The fetching head takes a digest from beside the key, such that it is aligned with what the
    reading head compares it with. Nothing for values that are neither needles nor pairs.
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
    """At the name that was assigned last, `name`: with it the answer to a tracking task begins."""
    context = asked.text[: asked.question]
    copied = _copied(asked, context.index(f"VAR {name} = ") + len("VAR "), name)
    return [Look(place, target, READING_HEAD, LAST_NAME_REPETITION) for place, target in copied]


def _copied(asked: Asked, start: int, value: str) -> list[tuple[int, int]]:
    """Of each token of `value` in the answer: the place before it, and it in the context.

    start: where the value begins in the context.
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
    """From the variable asked for along the links, one by one, to the value.

    Where the variable is not repeated right before the answer it is fetched first.
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
