"""Token sequences to learn from: facts hidden in filler, then questions with scored answers.

A sequence is one raw completion prompt or one chat, with as many facts and questions as fit.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from training.prose import pick_style
from training.tasks import Fact, KeySource, Question, make_fact, random_number
from training.tokenizer import ASSISTANT, END, END_OF_TEXT, SYSTEM, USER
from training.words import NOUNS, made_up_word

CONTEXT_WEIGHT = 0.2
CONTEXT_SHARE = 0.1
SHORT = 128  # sequences up to here have little room for anything but facts and questions

_PREFACES = (
    "",
    "",
    "Read the text and answer the question.",
    "Some facts are hidden in the following text. Remember them.",
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.",
)
_SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer with the number only.")
_SUFFIXES = ("", "", "", " Answer with the number only.", " Reply with just the number.")


@dataclass
class Sample:
    """One training sequence.

    weights[i]: how much predicting token i counts.
    answers[i]: the index in `kinds` of the answer token i belongs to, or -1.
    """

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def add_context(self, tokens: Sequence[int], rng: random.Random) -> None:
        """Appends tokens of which few are scored, and those lightly."""
        self.tokens += tokens
        self.weights += [CONTEXT_WEIGHT * (rng.random() < CONTEXT_SHARE) for _ in tokens]
        self.answers += [-1] * len(tokens)

    def add_answer(self, tokens: Sequence[int], kind: str) -> None:
        """Appends an answer, its end token included, every token fully scored."""
        self.tokens += tokens
        self.weights += [1.0] * len(tokens)
        self.answers += [len(self.kinds)] * len(tokens)
        self.kinds.append(kind)


@dataclass(frozen=True)
class Form:
    """How a prompt is written.

    opening: the text before the context.
    first_gap, next_gap: what separates the first and each later question from what is before it.
    ask, answer: the text of a question, and of its answer with the end token.
    """

    opening: str
    first_gap: str
    next_gap: str
    ask: Callable[[Question], str]
    answer: Callable[[Question], str]


def _wording(rng: random.Random, question: Question, is_varied: bool) -> str:
    if not is_varied:
        return question.wordings[0]
    return rng.choice(question.wordings) + rng.choice(_SUFFIXES)


def raw_form(rng: random.Random, is_varied: bool = True) -> Form:
    """A prompt for plain completion; the answer follows a space and ends with <|endoftext|>."""
    preface = rng.choice(_PREFACES) if is_varied else ""
    gap = rng.choice(("\n", "\n", "\n\n", " ")) if is_varied else "\n"
    template = "Question: {question}\nAnswer:"
    if is_varied and rng.random() < 0.7:
        template = rng.choice(
            (
                "Question: {question} Answer:",
                "Q: {question}\nA:",
                "{question} {lead}",
                "{question}\nAnswer:",
            )
        )

    def ask(question: Question) -> str:
        wording = _wording(rng, question, is_varied)
        return template.format(question=wording, lead=question.lead)

    opening = f"{preface}\n" if preface else ""
    return Form(opening, gap, gap, ask, lambda q: f" {q.answer}{END_OF_TEXT}")


def chat_form(rng: random.Random, is_varied: bool = True) -> Form:
    """A conversation as the chat template renders it: context and question in the user's turn."""
    preface = rng.choice(_PREFACES) if is_varied else ""
    system = (
        f"{SYSTEM}{rng.choice(_SYSTEM_MESSAGES)}{END}" if is_varied and rng.random() < 0.2 else ""
    )
    gap = rng.choice(("\n", "\n", "\n\n", " ")) if is_varied else "\n"
    template = "{}"
    if is_varied and rng.random() < 0.5:
        template = rng.choice(("Question: {}", "Question: {}\nAnswer:"))

    def ask(question: Question) -> str:
        wording = _wording(rng, question, is_varied)
        return f"{template.format(wording)}{END}{ASSISTANT}"

    opening = f"{system}{USER}{preface}\n" if preface else f"{system}{USER}"
    return Form(opening, gap, USER, ask, lambda q: f"{q.answer}{END}")


FORMS = {"raw": raw_form, "chat": chat_form}


@dataclass(frozen=True)
class _Turn:
    kind: str
    question: str
    answer: str


@dataclass
class _Plan:
    """Facts to hide and turns to ask, and the tokens they take."""

    facts: list[Fact] = field(default_factory=list)
    turns: list[_Turn] = field(default_factory=list)
    cost: int = 0
    has_passkey: bool = False


class SampleMaker:
    """Makes samples of a given length with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.sentence_ends = frozenset(self.encode(".") + self.encode("\n"))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def retrieval(
        self,
        rng: random.Random,
        length: int,
        kinds: Sequence[str],
        max_questions: int,
        is_varied: bool = True,
    ) -> Sample:
        """Facts of `kinds` in filler and questions about them, at most `length` tokens.

        is_varied: with prefaces and many wordings, rather than the simplest form of question.
        """
        form = FORMS[rng.choice(sorted(FORMS))](rng, is_varied)
        plan = self._plan(rng, form, length, kinds, max_questions)
        return self._assemble(rng, form, plan, length)

    def _plan(
        self, rng: random.Random, form: Form, length: int, kinds: Sequence[str], max_questions: int
    ) -> _Plan:
        """Facts and questions, added while they fit in a random share of the sequence."""
        keys, plan = KeySource(rng), _Plan()
        room = length - len(self.encode(form.opening)) - 4
        dense_room = room * rng.uniform(0.3 if length > 2 * SHORT else 0.8, 1.0)
        asked_share = rng.choice((1.0, 1.0, 0.5))
        for _ in range(length // 4):
            kind = rng.choice(kinds)
            if kind == "passkey" and plan.has_passkey:
                continue
            fact = make_fact(kind, rng, keys, num_pairs=_num_pairs(rng, length))
            is_asked = not plan.turns or rng.random() < asked_share
            max_turns = max_questions - len(plan.turns) if is_asked else 0
            turns = _ask_some(rng, form, fact, max_turns)
            cost = self._cost(fact, turns)
            if plan.cost + cost > (dense_room if plan.turns else room):
                if plan.turns:
                    break
                continue
            plan.facts.append(fact)
            plan.turns += turns
            plan.cost += cost
            plan.has_passkey |= kind == "passkey"
        rng.shuffle(plan.turns)
        return plan

    def _cost(self, fact: Fact, turns: Sequence[_Turn]) -> int:
        texts = [f" {statement}" for statement in fact.statements]
        texts += [f"\n{turn.question}{turn.answer}" for turn in turns]
        return sum(len(self.encode(text)) + 1 for text in texts)

    def _assemble(self, rng: random.Random, form: Form, plan: _Plan, length: int) -> Sample:
        gaps = [form.first_gap] + [form.next_gap] * len(plan.turns)
        turns = [
            (turn.kind, self.encode(gap + turn.question), self.encode(turn.answer))
            for gap, turn in zip(gaps, plan.turns, strict=False)
        ]
        opening = self.encode(form.opening)
        taken = len(opening) + sum(len(question) + len(answer) for _, question, answer in turns)
        sample = Sample()
        sample.add_context(opening, rng)
        sample.add_context(self.encode(self.context(rng, plan.facts, length - taken)), rng)
        for kind, question, answer in turns:
            sample.add_context(question, rng)
            sample.add_answer(answer, kind)
        return sample

    def context(self, rng: random.Random, facts: Sequence[Fact], budget: int) -> str:
        """The facts' statements at random places in filler, at most `budget` tokens."""
        separator = rng.choice((" ", " ", "\n"))
        statements = _interleave(rng, facts)
        make_sentence = pick_style(rng)
        room = budget - sum(len(self.encode(separator + text)) for text in statements)
        filler: list[str] = []
        while True:
            sentence = make_sentence(rng)
            room -= len(self.encode(separator + sentence))
            if room < 0:
                break
            filler.append(sentence)
        return separator.join(_scatter(rng, statements, filler))

    def copying(self, rng: random.Random, length: int) -> Sample:
        """Random tokens, twice; the second time is the answer."""
        half = rng.randint(4, length // 2)
        tokens = [rng.randrange(5, len(self._tokenizer)) for _ in range(half)]
        sample = Sample()
        sample.add_context(tokens, rng)
        sample.add_context(tokens[:2], rng)
        sample.add_answer(tokens[2 : length - half], "copy")
        return sample

    def pairs(self, rng: random.Random, length: int) -> Sample:
        """Lines `word = number`, then some of them again in another order."""
        sample = Sample()
        lines: dict[str, str] = {}
        room = length
        while True:
            word = made_up_word(rng) if rng.random() < 0.2 else rng.choice(NOUNS)
            number = random_number(rng)
            room -= 2 * len(self.encode(f"{word} = {number}\n"))
            if room < 0:
                break
            lines[word] = number
        sample.add_context(self.encode("".join(f"{w} = {n}\n" for w, n in lines.items())), rng)
        for word in rng.sample(sorted(lines), len(lines)):
            sample.add_context(self.encode(f"{word} ="), rng)
            sample.add_answer(self.encode(f" {lines[word]}\n"), "pair")
        return sample


def _ask_some(rng: random.Random, form: Form, fact: Fact, max_turns: int) -> list[_Turn]:
    """Turns about up to a quarter of the fact's questions, at least one if any are allowed."""
    most = min(max_turns, rng.randint(1, max(1, len(fact.questions) // 4)))
    questions = rng.sample(fact.questions, most)
    return [_Turn(q.kind, form.ask(q), form.answer(q)) for q in questions]


def _num_pairs(rng: random.Random, length: int) -> int:
    """Pairs of a JSON object: from two to what fills three quarters of the sequence."""
    most = max(2, length * 3 // 4 // 18)
    return round(2 * math.pow(most / 2, rng.random()))


def _interleave(rng: random.Random, facts: Sequence[Fact]) -> list[str]:
    """All statements in random order, except that each fact's own stay in their order."""
    order = [index for index, fact in enumerate(facts) for _ in fact.statements]
    rng.shuffle(order)
    waiting = [iter(fact.statements) for fact in facts]
    return [next(waiting[index]) for index in order]


def _scatter(rng: random.Random, statements: Sequence[str], filler: Sequence[str]) -> list[str]:
    """Statements, in order, at random places between filler sentences."""
    places = sorted(rng.randint(0, len(filler)) for _ in statements)
    pieces: list[str] = []
    start = 0
    for place, statement in zip(places, statements, strict=True):
        pieces += [*filler[start:place], statement]
        start = place
    return [*pieces, *filler[start:]]
