"""Clients that ask for all sorts of things, and know what they should get."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import openai

SHORT = "The pass key is 48219. Remember it. What is the pass key?"
LONG = "The pass key is 48219. Remember it. " + "The grass is green. " * 250 + "The pass key is"


class Outcome(StrEnum):
    DONE = "done"  # the answer of a quiet service
    REFUSED = "refused"  # 429, and asked again later
    LEFT = "left by the client"
    BAD = "bad, and refused as such"
    WRONG = "wrong"  # complete, but another answer
    LOST = "lost"  # anything else


@dataclass(frozen=True)
class Kind:
    """One sort of request.  leaves_after: chunks that the client reads before it goes away."""

    name: str
    ask: dict[str, Any]
    leaves_after: int | None = None
    is_bad: bool = False

    @property
    def body(self) -> dict[str, Any]:
        common = {"model": "winnow-tiny", "seed": 7, "temperature": 0.8, "stream": True}
        return common | {"max_tokens": 48} | self.ask


_TO_THE_END = {"extra_body": {"ignore_eos": True}}
KINDS = (
    Kind("short stream", {"prompt": SHORT}),
    Kind("long stream", {"prompt": LONG, "max_tokens": 160, **_TO_THE_END}),
    Kind("long, whole", {"prompt": LONG, "stream": False, **_TO_THE_END}),
    Kind("several answers", {"prompt": LONG, "n": 3, **_TO_THE_END}),
    Kind("several prompts", {"prompt": [SHORT, LONG], **_TO_THE_END}),
    Kind("stop strings", {"prompt": LONG, "stop": [".", "key"], "temperature": 0}),
    Kind("penalties", {"prompt": SHORT, "frequency_penalty": 0.7, "presence_penalty": 0.4}),
    Kind("log-probabilities", {"prompt": SHORT, "logprobs": 3, "stream": False}),
    Kind("leaves", {"prompt": LONG, "max_tokens": 400, **_TO_THE_END}, leaves_after=5),
    Kind("leaves at once", {"prompt": LONG, "max_tokens": 400, **_TO_THE_END}, leaves_after=0),
    Kind("bad", {"prompt": SHORT, "max_tokens": 0}, is_bad=True),
)
Answer = dict[int, tuple[str, str | None]]  # text and finish reason by choice


@dataclass
class Load:
    """What the clients have asked, and how it ended."""

    base_url: str
    max_requests: int
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    failures: list[str] = field(default_factory=list)
    _expected: dict[str, Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._openai = openai.AsyncOpenAI(
            base_url=self.base_url, api_key="none", max_retries=0, timeout=120
        )

    async def learn(self) -> None:
        """Asks for every kind once, of a service that nobody disturbs."""
        for kind in KINDS:
            if kind.leaves_after is None and not kind.is_bad:
                self._expected[kind.name] = await self._answer(kind)

    async def run_client(self, rng: random.Random, stopped: asyncio.Event) -> None:
        """One request after the other, until it is stopped or all have been asked."""
        while not stopped.is_set() and self.by_kind.total() < self.max_requests:
            kind = rng.choice(KINDS)
            self.by_kind[kind.name] += 1
            self.outcomes[await self._outcome(kind)] += 1

    async def close(self) -> None:
        await self._openai.close()

    async def _outcome(self, kind: Kind) -> Outcome:
        try:
            answer = await self._served(kind)
        except openai.BadRequestError as error:
            return Outcome.BAD if kind.is_bad else self._failed(kind, Outcome.LOST, error)
        except openai.APIError as error:
            return self._failed(kind, Outcome.LOST, error)
        if kind.leaves_after is not None:
            return Outcome.LEFT
        if answer != self._expected.get(kind.name):
            return self._failed(kind, Outcome.WRONG, answer)
        return Outcome.DONE

    def _failed(self, kind: Kind, outcome: Outcome, what: object) -> Outcome:
        self.failures.append(f"{kind.name}: {outcome}: {what!r}")
        return outcome

    async def _served(self, kind: Kind) -> Answer:
        """The answer, asked for again when the service has no room."""
        while True:
            try:
                return await self._answer(kind)
            except openai.RateLimitError as error:
                self.outcomes[Outcome.REFUSED] += 1
                await asyncio.sleep(float(error.response.headers["retry-after"]))

    async def _answer(self, kind: Kind) -> Answer:
        answered = await self._openai.completions.create(**kind.body)
        if isinstance(answered, openai.AsyncStream):
            return await self._read(kind, answered)
        self._count(answered.usage)
        return {choice.index: (choice.text, choice.finish_reason) for choice in answered.choices}

    async def _read(self, kind: Kind, stream: openai.AsyncStream[Any]) -> Answer:
        answer: Answer = {}
        num_chunks = 0
        async with stream as chunks:
            async for chunk in chunks:
                if num_chunks == kind.leaves_after:
                    break
                num_chunks += 1
                for choice in chunk.choices:
                    text, _ = answer.get(choice.index, ("", None))
                    answer[choice.index] = (text + choice.text, choice.finish_reason)
        self.num_tokens += num_chunks
        return answer

    def _count(self, usage: Any) -> None:
        self.num_tokens += usage.completion_tokens
