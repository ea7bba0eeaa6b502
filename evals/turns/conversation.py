"""Conversations about one document: each turn asks for another number that is hidden in it."""

from evals import templates
from evals.metrics import string_match_all
from evals.prose import essay
from evals.tasks.base import CountTokens, Example, Question, rng_of
from evals.tasks.fill import Supply, hide, most_that_fit
from evals.tasks.needles import NeedleTask, number, word_key

TASK = NeedleTask("turns", "prose")
METRIC = string_match_all


def conversation(
    index: int, seed: int, length: int, num_turns: int, count: CountTokens
) -> list[Example]:
    """One example per turn, as of RULER's niah_multikey: all begin with the same document.

    Their prompts have at most `length` tokens, as counted by `count`.
    Raises InvalidSetting if they do not fit.
    """
    rng = rng_of(TASK.name, index, seed, length)
    needles: dict[str, str] = {}
    while len(needles) < num_turns:
        needles[word_key(rng)] = number(rng)
    statements = [
        templates.NEEDLE.format(noun="numbers", key=key, value=value)
        for key, value in needles.items()
    ]
    rng.shuffle(statements)
    depths = sorted(rng.random() for _ in statements)
    filler = Supply(essay(rng))

    def ask(key: str, context: str) -> Example:
        fields = {"noun": "number", "query": key}
        return Question(templates.NEEDLE_ONE, fields, (needles[key],)).around(TASK, index, context)

    def make(num_pieces: int) -> Example:
        return ask(longest, " ".join(hide(statements, depths, filler.first(num_pieces))))

    longest = max(needles, key=lambda key: count(ask(key, "").prompt()))
    context = most_that_fit(make, length, count).context
    return [ask(key, context) for key in needles]
