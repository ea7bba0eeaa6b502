"""Every answer that ends matches what was asked for, also one whose worker was lost."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import pytest_asyncio

from services.gateway.request.run import Service
from tests.random_schemas import random_schema
from tests.services.gateway.request.prompt_runs import REQUEST, answers, make_run, parts_of
from tests.services.gateway.service import MODEL_NAME, TestService
from winnow.grammar.source import schema_grammar

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_SCHEMAS, AT_ONCE = 100, 20
LEAST_ENDED = 60  # the others are cut short by max_tokens
CHAT: dict[str, Any] = {
    "model": MODEL_NAME,
    "messages": [{"role": "user", "content": "the quick brown fox"}],
    "max_tokens": 250,
}


async def answer(service: TestService, seed: int, turns: asyncio.Semaphore) -> str | None:
    """The text of an answer that has ended; half of them are greedy."""
    schema = {"name": "random", "schema": random_schema(seed)}
    asked = {
        "response_format": {"type": "json_schema", "json_schema": schema},
        "temperature": seed % 2,
        "seed": seed,
    }
    async with turns:
        response = await service.http.post("/v1/chat/completions", json=CHAT | asked)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    text: str = choice["message"]["content"]
    return text if choice["finish_reason"] == "stop" else None


async def test_answers_to_random_schemas_are_their_instances(service: TestService) -> None:
    turns = asyncio.Semaphore(AT_ONCE)
    texts = await asyncio.gather(*(answer(service, seed, turns) for seed in range(NUM_SCHEMAS)))
    ended = [(seed, text) for seed, text in enumerate(texts) if text is not None]
    for seed, text in ended:
        jsonschema.validate(json.loads(text), random_schema(seed))
    assert len(ended) >= LEAST_ENDED


@pytest_asyncio.fixture(loop_scope="module")
async def parts(several: TestService) -> AsyncIterator[Service]:
    async with parts_of(several) as parts:
        yield parts


@pytest.mark.parametrize("seed", range(5))
async def test_an_answer_goes_on_in_its_grammar_at_another_worker(
    several: TestService, parts: Service, seed: int
) -> None:
    changes: dict[str, Any] = {"max_tokens": 400, "temperature": seed % 2, "ignore_eos": False}
    sampling = replace(REQUEST.sampling, seed=seed, **changes)
    items = random_schema(seed)
    defined = {"$defs": items.pop("$defs", {})}
    grammar = schema_grammar({"type": "array", "items": items, "minItems": 200, **defined})
    request = replace(REQUEST, num_sequences=2, sampling=sampling, grammar=grammar)
    expected = await answers(several, make_run(parts, request))
    run = make_run(parts, request)
    assert await answers(several, run, harm_after=15) == expected
    assert (run.stats.migrations, run.stats.attempts) == (1, 2)
