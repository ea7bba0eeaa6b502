"""Questions about documents of generated facts, in place of SQuAD and HotpotQA (RULER's qa)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from evals import templates
from evals.metrics import string_match_part
from evals.prose import essay
from evals.tasks.base import CountTokens, Example, Metric, Question, rng_of
from evals.tasks.fill import Supply, hide, most_that_fit
from evals.words import ADJECTIVES, NOUNS, made_up_word

_MAX_SENTENCES = 3


@dataclass(frozen=True, slots=True)
class Person:
    """The subject of a document."""

    name: str
    city: str
    employer: str


@dataclass(frozen=True, slots=True)
class FactsTask:
    """One document per person; the question needs one fact (1 hop) or two linked by a name (2)."""

    name: str
    num_hops: int
    group: str = "ruler"
    max_new_tokens: int = 32
    metric: Metric = string_match_part

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        rng = rng_of(self.name, index, seed, length)
        people = _people(rng)
        worker, employer = next(people), next(people)
        question = self._question(worker, employer)
        needed = [_document(rng, person) for person in (worker, employer)]
        rng.shuffle(needed)
        depths = sorted(rng.random() for _ in needed)
        others = Supply(_document(rng, person) for person in _disordered(rng, people))

        def make(num_others: int) -> Example:
            documents = hide(needed, depths, others.first(num_others))
            numbered = (f"Document {i}:\n{text}" for i, text in enumerate(documents, start=1))
            return question.around(self, index, "\n\n".join(numbered))

        return most_that_fit(make, length, count)

    def _question(self, worker: Person, employer: Person) -> Question:
        if self.num_hops == 1:
            query, answer = f"In which city does {worker.name} live?", worker.city
        else:
            query = f"In which city does the person live for whom {worker.name} works?"
            answer = employer.city
        return Question(templates.DOCUMENTS, {"query": query}, (answer,))


def _people(rng: Random) -> Iterator[Person]:
    """Endless people, each working for the next; names and cities are distinct."""
    used: set[str] = set()

    def name() -> str:
        while (made := made_up_word(rng).capitalize()) in used:
            pass
        used.add(made)
        return made

    employer = f"{name()} {name()}"
    while True:
        person, employer = employer, f"{name()} {name()}"
        yield Person(person, name(), employer)


def _disordered(rng: Random, people: Iterator[Person]) -> Iterator[Person]:
    """`people`, shuffled in groups of 16."""
    while True:
        some = list(islice(people, 16))
        rng.shuffle(some)
        yield from some


def _document(rng: Random, person: Person) -> str:
    facts = [
        f"{person.name} lives in {person.city}.",
        f"{person.name} works for {person.employer}.",
        f"{person.name} likes the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}.",
    ]
    rng.shuffle(facts)
    prose = essay(rng)
    sentences = [next(prose) for _ in range(rng.randint(0, _MAX_SENTENCES))]
    return f"{person.name}\n{' '.join([*facts, *sentences])}"


FACTS_TASKS = (FactsTask("qa_1_facts", 1), FactsTask("qa_2_facts", 2))
