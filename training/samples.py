"""Training sequences: facts hidden in filler text, then questions with scored answers.

A sequence is one raw completion prompt or one chat, with as many facts and questions as fit.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from transformers import PreTrainedTokenizerFast

from evals.prose import pick_style
from evals.words import NOUNS, made_up_word
from training.looks import DECIDING_TOKENS, Asked, Look, looks_for
from training.tasks import (
    CHAINS,
    Fact,
    KeySource,
    Question,
    hexadecimal,
    make_fact,
    random_number,
    variable,
)
from training.tokenizer import ASSISTANT, END, END_OF_TEXT, SYSTEM, USER

CONTEXT_WEIGHT = 0.2
CONTEXT_SHARE = 0.1
SHORT = 128  # up to this length there is little room for anything but facts and questions

_SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer with the number only.")
_SUFFIXES = ("", "", "", " Answer with the number only.", " Reply with just the number.")
_BENCHMARK_SHARE = 0.5
CHAIN_ASKED_SHARE = 0.5  # the other chains are distractors
MAX_MISSES = 4  # facts that did not fit, after which the sequence counts as full
FOLLOWING_WEIGHT = 0.3  # weight of an answer's tokens after its deciding ones


@dataclass(frozen=True)
class Located:
    """A text and its tokens; ends: for each token, the index of the character after its last."""

    text: str
    tokens: list[int]
    ends: list[int]


def joined(pieces: Sequence[Located]) -> tuple[Located, list[int]]:
    """The pieces concatenated, and the index of the first character of each."""
    starts = list(accumulate((len(piece.text) for piece in pieces), initial=0))[:-1]
    whole = Located(
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        [start + end for piece, start in zip(pieces, starts, strict=True) for end in piece.ends],
    )
    return whole, starts


@dataclass
class Sample:
    """One training sequence.

    weights[i]: loss weight of predicting token i.
    answers[i]: index in `kinds` of the answer that token i belongs to, or -1.
    hops[k]: number of look-ups that answer k needs.
    """

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    hops: list[int] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)

    def add_context(self, tokens: Sequence[int], rng: random.Random) -> None:
        """Append context tokens, few of which are scored, with a low weight."""
        self.tokens += tokens
        self.weights += [CONTEXT_WEIGHT * (rng.random() < CONTEXT_SHARE) for _ in tokens]
        self.answers += [-1] * len(tokens)

    def add_answer(self, tokens: Sequence[int], kind: str, hops: int = 1) -> None:
        """Append an answer with its end token; its first tokens have full weight."""
        self.tokens += tokens
        num_following = max(0, len(tokens) - DECIDING_TOKENS)
        self.weights += [1.0] * (len(tokens) - num_following) + [FOLLOWING_WEIGHT] * num_following
        self.answers += [len(self.kinds)] * len(tokens)
        self.kinds.append(kind)
        self.hops.append(hops)


@dataclass(frozen=True)
class Form:
    """The form of a prompt.

    before: the text before the opening.
    next_gap: the separator between an answer and the next question.
    ask: gives the text of a question.
    end: the token after an answer.
    """

    before: str
    next_gap: str
    ask: Callable[[Question], str]
    end: str


def _wording(rng: random.Random, question: Question, is_varied: bool) -> str:
    if not is_varied:
        return question.wordings[0]
    suffix = rng.choice(_SUFFIXES) if question.kind in ("needle", "passkey", "json") else ""
    return rng.choice(question.wordings) + suffix


def raw_form(rng: random.Random, is_varied: bool = True) -> Form:
    """A plain completion prompt; the answer follows a space and ends with <|endoftext|>."""
    gap = rng.choice(("\n", "\n", "\n\n", " ")) if is_varied else "\n"
    templates = ("Question: {} Answer:", "Q: {}\nA:", "Question: {}\nAnswer:", "{}\nAnswer:")
    template = rng.choice(templates) if is_varied else "Question: {}\nAnswer:"
    is_benchmark = is_varied and rng.random() < _BENCHMARK_SHARE

    def ask(question: Question) -> str:
        if is_benchmark or question.kind in CHAINS:
            return f"{question.asked}{question.lead}"
        return gap + template.format(_wording(rng, question, is_varied))

    return Form("", "", ask, END_OF_TEXT)


def chat_form(rng: random.Random, is_varied: bool = True) -> Form:
    """A conversation in the chat template's format, with context and question in the user turn."""
    has_system = is_varied and rng.random() < 0.2
    system = f"{SYSTEM}{rng.choice(_SYSTEM_MESSAGES)}{END}" if has_system else ""
    gap = rng.choice(("\n", "\n", "\n\n", " ")) if is_varied else "\n"
    is_benchmark = is_varied and rng.random() < _BENCHMARK_SHARE

    def ask(question: Question) -> str:
        text = question.asked if is_benchmark else gap + _wording(rng, question, is_varied)
        return f"{text}{END}{ASSISTANT}"

    return Form(f"{system}{USER}", USER, ask, END)


FORMS = {"raw": raw_form, "chat": chat_form}


@dataclass(frozen=True)
class _Turn:
    question: Question
    text: str
    answer: str


def _turn(form: Form, question: Question) -> _Turn:
    text = form.ask(question)
    gap = "" if text.endswith((" ", ASSISTANT)) else " "
    return _Turn(question, text, f"{gap}{question.answer}{form.end}")


@dataclass
class _Plan:
    """Facts to hide and questions to ask, and the number of tokens they take."""

    facts: list[Fact] = field(default_factory=list)
    turns: list[_Turn] = field(default_factory=list)
    cost: int = 0


class SampleMaker:
    """Makes samples of a given length with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.sentence_ends = frozenset(self.encode(".") + self.encode("\n"))

    def encode(self, text: str) -> list[int]:
        """Token IDs of `text`, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def located(self, text: str) -> Located:
        """The tokens of `text`, without special tokens, and where each ends."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        return Located(text, list(encoded["input_ids"]), ends)

    def count(self, text: str) -> int:
        """Number of tokens of `text`, without special tokens."""
        return len(self.encode(text))

    def retrieval(
        self,
        rng: random.Random,
        length: int,
        kinds: Sequence[str],
        max_questions: int,
        is_varied: bool = True,
    ) -> Sample:
        """Facts of `kinds` in filler and questions about them, at most `length` tokens.

        is_varied: use varied wordings instead of the simplest form of question.
        """
        form = FORMS[rng.choice(("raw", "raw", "chat"))](rng, is_varied)
        plan = self._plan(rng, form, length, kinds, max_questions)
        opening = rng.choice(plan.turns).question.opening if plan.turns else ""
        opening = opening if is_varied and rng.random() < 0.7 else ""
        return self._assemble(rng, form, form.before + opening, plan, length)

    def _plan(
        self, rng: random.Random, form: Form, length: int, kinds: Sequence[str], max_questions: int
    ) -> _Plan:
        """Facts and questions, added until a random share of the sequence is full."""
        keys, plan, singles = KeySource(rng), _Plan(), set[str]()
        room = length - 48 if length > SHORT else length - 8
        dense_room = room * rng.uniform(0.5 if length > 2 * SHORT else 0.9, 1.0)
        asked_share = rng.choice((1.0, 1.0, 1.0, 0.6))
        misses = 0
        for _ in range(length // 4):
            kind = rng.choice(kinds)
            if kind in singles:
                continue
            fact = make_fact(kind, rng, keys, _size(rng, length))
            share = asked_share * (CHAIN_ASKED_SHARE if kind in CHAINS else 1)
            is_asked = not plan.turns or rng.random() < share
            max_turns = max_questions - len(plan.turns) if is_asked else 0
            turns = _ask_some(rng, form, fact, max_turns)
            cost = self._cost(fact, turns)
            if plan.cost + cost > (dense_room if plan.turns else room):
                misses += bool(plan.turns)
                if misses > MAX_MISSES:
                    break
                continue
            plan.facts.append(fact)
            plan.turns += turns
            plan.cost += cost
            if kind in ("passkey", "number_string"):
                singles.add(kind)
        rng.shuffle(plan.turns)
        return plan

    def _cost(self, fact: Fact, turns: Sequence[_Turn]) -> int:
        texts = [f" {statement}" for statement in fact.statements]
        texts += [f"{turn.text}{turn.answer}" for turn in turns]
        return sum(len(self.encode(text)) + 1 for text in texts)

    def _assemble(
        self, rng: random.Random, form: Form, opening: str, plan: _Plan, length: int
    ) -> Sample:
        gaps = [""] + [form.next_gap] * len(plan.turns)
        texts = [gap + turn.text for gap, turn in zip(gaps, plan.turns, strict=False)]
        asked = [self.located(text) for text in texts]
        answered = [self.located(turn.answer) for turn in plan.turns]
        start = self.located(opening)
        taken = sum(len(piece.tokens) for piece in (start, *asked, *answered))
        context = self.located(self.context(rng, plan.facts, length - taken))
        sample, pieces = Sample(), [start, context]
        sample.add_context(start.tokens, rng)
        sample.add_context(context.tokens, rng)
        for turn, question, answer in zip(plan.turns, asked, answered, strict=True):
            sample.add_context(question.tokens, rng)
            sample.add_answer(answer.tokens, turn.question.kind, turn.question.hops)
            pieces += [question, answer]
        whole, starts = joined(pieces)
        for turn, question_start, answer_start in zip(
            plan.turns, starts[2::2], starts[3::2], strict=True
        ):
            place = Asked(whole.text, whole.ends, question_start, answer_start)
            sample.looks += looks_for(place, turn.question.kind, (turn.question.answer,))
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
        """Random tokens twice; the second copy is the answer."""
        half = rng.randint(4, length // 2)
        tokens = [rng.randrange(5, len(self._tokenizer)) for _ in range(half)]
        sample = Sample()
        sample.add_context(tokens, rng)
        sample.add_context(tokens[:2], rng)
        sample.add_answer(tokens[2 : length - half], "copy")
        return sample

    def pairs(self, rng: random.Random, length: int) -> Sample:
        """Lines `key = number`, then all of them again in another order."""
        sample = Sample()
        lines: dict[str, str] = {}
        room = length
        make_key = rng.choice((_noun, _noun, variable, _short_hexadecimal))
        while True:
            word = make_key(rng)
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


def _noun(rng: random.Random) -> str:
    return made_up_word(rng) if rng.random() < 0.2 else rng.choice(NOUNS)


def _short_hexadecimal(rng: random.Random) -> str:
    return hexadecimal(rng, 1)[: rng.randint(4, 8)]


def _ask_some(rng: random.Random, form: Form, fact: Fact, max_turns: int) -> list[_Turn]:
    """Turns about up to half of the fact's questions (of a chain, all), at least one if any."""
    num_known = len(fact.questions)
    is_chain = fact.questions[0].kind in CHAINS
    most = min(max_turns, rng.randint(1, num_known if is_chain else max(1, num_known // 2)))
    return [_turn(form, question) for question in rng.sample(fact.questions, most)]


def _size(rng: random.Random, length: int) -> float:
    """Size of a fact from 0 to 1: from the smallest to one that fills most of the sequence."""
    most = min(1.0, length / 2048)
    return 0.05 * math.pow(most / 0.05, rng.random())


def _interleave(rng: random.Random, facts: Sequence[Fact]) -> list[str]:
    """All statements in random order, except that statements of an ordered fact keep theirs."""
    order = [index for index, fact in enumerate(facts) for _ in fact.statements]
    rng.shuffle(order)
    waiting = []
    for fact in facts:
        statements = list(fact.statements)
        if fact.is_shuffled:
            rng.shuffle(statements)
        waiting.append(iter(statements))
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
