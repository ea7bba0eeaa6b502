"""Traffic that repeats itself: questions about a few documents, and traces of real services.

A trace is JSON Lines as Mooncake publishes them: `timestamp` in milliseconds, `input_length`,
`output_length`, and `hash_ids`, one for each block of 512 tokens, equal where prompts begin alike.
Its hits are compared with those of a cache that forgets nothing, which is the most that there is.
"""

import asyncio
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.client import TimedAnswer, complete
from examples.demo import running_service
from winnow.engine.prefix.hashes import block_hashes

TRACE_BLOCK_TOKENS = 512
NUM_DOCUMENTS, NUM_QUESTIONS, NUM_CLIENTS, MAX_TOKENS = 8, 64, 4, 4
FIRST_TOKEN_ID, NUM_TOKEN_IDS = 300, 200  # ordinary ones of the embedded model


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """at_s: seconds since the trace began."""

    at_s: float
    prompt: list[int]
    max_tokens: int


def mixed_documents(quick: bool) -> list[dict[str, Any]]:
    """Questions about several documents in random order, to two prefill workers."""
    document_tokens = 512 if quick else 2048
    rng = random.Random(0)
    documents = [_tokens(document_tokens, f"document {idx}") for idx in range(NUM_DOCUMENTS)]
    prompts = [
        documents[idx % NUM_DOCUMENTS] + _tokens(32, f"question {idx}")
        for idx in range(NUM_QUESTIONS)
    ]
    rng.shuffle(prompts)
    rows = []
    for cache, affinity in (("off", "-"), ("on", "off"), ("on", "on")):
        size = "0" if cache == "off" else "512MiB"
        flags = ["--prefill-replicas", "2", "--prefix-cache-bytes", size]
        if affinity == "off":
            flags += ["--prefix-affinity", "false"]
        with running_service(*flags) as url:
            found = asyncio.run(_ask_all(url, prompts))
        rows.append({"prefix cache": cache, "affinity": affinity} | _summary(*found))
    return rows


async def _ask_all(url: str, prompts: Sequence[list[int]]) -> tuple[list[TimedAnswer], float]:
    """The answers to a few clients that ask one prompt after the other, and seconds for all."""
    waiting, answers = iter(prompts), list[TimedAnswer]()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def ask_on() -> None:
            for prompt in waiting:
                answers.append(await complete(client, prompt, MAX_TOKENS, {}))

        start_s = time.perf_counter()
        await asyncio.gather(*(ask_on() for _ in range(NUM_CLIENTS)))
        return answers, time.perf_counter() - start_s


def trace(path: Path, quick: bool, tokens_per_block: int) -> list[dict[str, Any]]:
    """A trace's requests at their times, on the embedded model.

    tokens_per_block: of ours for one of the trace's, whose prompts are longer than our windows.
    """
    requests = read_trace(path.read_text().splitlines(), tokens_per_block)
    requests = requests[: 50 if quick else None]
    with running_service("--prefix-cache-bytes", "1GiB") as url:
        answers, seconds = asyncio.run(_replay(url, requests))
    num_tokens = sum(len(request.prompt) for request in requests)
    endless = endless_hits([request.prompt for request in requests], tokens_per_block)
    return [_summary(answers, seconds) | {"endless cache's hits": endless / num_tokens}]


def read_trace(lines: Iterable[str], tokens_per_block: int) -> list[TracedRequest]:
    """Requests whose prompts have equal blocks where the trace's have."""
    requests = []
    for line in lines:
        told = json.loads(line)
        blocks = [_tokens(tokens_per_block, f"block {name}") for name in told["hash_ids"]]
        length = max(1, told["input_length"] * tokens_per_block // TRACE_BLOCK_TOKENS)
        prompt = [token for block in blocks for token in block][:length]
        num_output = max(1, told["output_length"] * tokens_per_block // TRACE_BLOCK_TOKENS)
        requests.append(TracedRequest(told["timestamp"] / 1000, prompt, num_output))
    return requests


def endless_hits(prompts: Iterable[Sequence[int]], block_tokens: int) -> int:
    """Tokens that an earlier prompt began with too, by whole blocks; one is always computed."""
    seen, hits = set[bytes](), 0
    for prompt in prompts:
        blocks = block_hashes(prompt, b"", block_tokens)
        known = sum(block in seen for block in blocks)
        hits += min(known * block_tokens, len(prompt) - 1)
        seen.update(blocks)
    return hits


async def _replay(url: str, requests: Sequence[TracedRequest]) -> tuple[list[TimedAnswer], float]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        start_s = time.perf_counter()

        async def ask(request: TracedRequest) -> TimedAnswer:
            await asyncio.sleep(max(0.0, start_s + request.at_s - time.perf_counter()))
            return await complete(client, request.prompt, request.max_tokens, {})

        answers = await asyncio.gather(*(ask(request) for request in requests))
        return list(answers), time.perf_counter() - start_s


def _tokens(count: int, name: str) -> list[int]:
    """Token ids that follow from the name."""
    rng = random.Random(name)
    return [FIRST_TOKEN_ID + rng.randrange(NUM_TOKEN_IDS) for _ in range(count)]


def _summary(answers: Sequence[TimedAnswer], seconds: float) -> dict[str, Any]:
    ttfts_s = sorted(answer.ttft_s for answer in answers)
    prompt_tokens = sum(answer.usage["prompt_tokens"] for answer in answers)
    cached = sum(answer.usage["prompt_tokens_details"]["cached_tokens"] for answer in answers)
    return {
        "requests": len(answers),
        "hits": cached / prompt_tokens,
        "requests/s": len(answers) / seconds,
        "TTFT p50 ms": 1e3 * median(ttfts_s),
        "TTFT p99 ms": 1e3 * ttfts_s[int(0.99 * (len(ttfts_s) - 1))],
    }
