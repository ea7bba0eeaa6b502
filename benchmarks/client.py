"""HTTP client for the benchmarks: random-word prompts and timed streaming completions."""

import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

WORDS = ["river", "stone", "lantern", "garden", "window", "harbor", "market", "winter", "copper"]


@dataclass
class TimedAnswer:
    """A streamed completion: seconds until each text chunk and until the end, and its `usage`."""

    times_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        return self.times_s[0]


async def prompt_of(client: httpx.AsyncClient, num_tokens: int, seed: int) -> list[int]:
    """Token IDs of a random-word prompt of exactly `num_tokens` tokens."""
    rng = random.Random(seed)
    text = " ".join(rng.choices(WORDS, k=2 * num_tokens))
    response = await client.post("/tokenize", json={"prompt": text})
    return response.json()["tokens"][:num_tokens]  # type: ignore[no-any-return]


async def complete(
    client: httpx.AsyncClient,
    prompt: list[int],
    max_tokens: int,
    winnow: dict[str, Any] | None,
    model: str = "winnow-tiny",
) -> TimedAnswer:
    """winnow: the request's own pruning settings; None for a service that knows none."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    } | ({} if winnow is None else {"winnow": winnow})
    answer, start = TimedAnswer(), time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                answer.usage = chunk.get("usage") or answer.usage
                if chunk["choices"]:
                    answer.times_s.append(time.perf_counter() - start)
    answer.total_s = time.perf_counter() - start
    return answer
