"""Overload benchmark: goodput when requests arrive faster than the service can handle them.

Starts `winnow serve` on the embedded model. A closed loop of clients, twice as many as the batch
needs, first measures the saturating rate. Then requests arrive in an open loop (Poisson) at 0.5, 1,
2 and 3 times that rate. Goodput is complete answers per second, over the requests that arrived
within the time; the others are refused at once with 429, which costs the client a retry and the
service almost nothing. Target: goodput at three times the load is at least 0.9 of the best.
"""

import asyncio
import random
import time
from collections import Counter
from statistics import median
from typing import Any

import httpx

from benchmarks.client import TimedAnswer, complete, prompt_of
from benchmarks.report import arguments, show, write_json
from examples.demo import running_service

PROMPT_TOKENS, MAX_TOKENS, NUM_PROMPTS, NUM_WAITING_CLIENTS = 512, 64, 16, 16
LOADS = (0.5, 1.0, 2.0, 3.0)


async def saturating_rate(
    client: httpx.AsyncClient, prompts: list[list[int]], duration_s: float
) -> float:
    """Answers per second to clients that send a new request as soon as they have an answer."""
    end_s, answered = time.perf_counter() + duration_s, 0

    async def ask_again_and_again(seed: int) -> None:
        nonlocal answered
        while time.perf_counter() < end_s:
            await complete(client, prompts[seed % NUM_PROMPTS], MAX_TOKENS, {})
            answered += 1

    start_s = time.perf_counter()
    await asyncio.gather(*(ask_again_and_again(seed) for seed in range(NUM_WAITING_CLIENTS)))
    return answered / (time.perf_counter() - start_s)


async def offered(
    client: httpx.AsyncClient, prompts: list[list[int]], rate: float, duration_s: float
) -> tuple[list[TimedAnswer], Counter[int], float]:
    """Answers, refusals by HTTP status, and seconds until the last request ended."""
    rng, answers, refused = random.Random(0), list[TimedAnswer](), Counter[int]()

    async def ask(prompt: list[int]) -> None:
        try:
            answers.append(await complete(client, prompt, MAX_TOKENS, {}))
        except httpx.HTTPStatusError as error:
            refused[error.response.status_code] += 1

    start_s = time.perf_counter()
    async with asyncio.TaskGroup() as asked:
        at_s = 0.0
        while (at_s := at_s + rng.expovariate(rate)) < duration_s:
            await asyncio.sleep(max(0.0, start_s + at_s - time.perf_counter()))
            asked.create_task(ask(rng.choice(prompts)))
    return answers, refused, time.perf_counter() - start_s


async def measure(url: str, duration_s: float) -> list[dict[str, Any]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        prompts = [await prompt_of(client, PROMPT_TOKENS, seed) for seed in range(NUM_PROMPTS)]
        rate = await saturating_rate(client, prompts, duration_s)
        rows: list[dict[str, Any]] = []
        for load in LOADS:
            answers, refused, taken_s = await offered(client, prompts, load * rate, duration_s)
            whole = sum(a.usage.get("completion_tokens") == MAX_TOKENS for a in answers)
            rows.append(
                {
                    "load": load,
                    "asked": len(answers) + refused.total(),
                    "whole answers": whole,
                    "refused (429)": refused[429],
                    "other errors": refused.total() - refused[429] + len(answers) - whole,
                    "goodput per s": whole / taken_s,
                    "median TTFT s": median(answer.ttft_s for answer in answers),
                }
            )
    best = max(row["goodput per s"] for row in rows)
    return [row | {"of the best": row["goodput per s"] / best} for row in rows]


def main() -> None:
    options = arguments("goodput of a service that is asked for more than it can do").parse_args()
    with running_service() as url:
        rows = asyncio.run(measure(url, 15 if options.quick else 60))
    sizes = f"prompts of {PROMPT_TOKENS} tokens, answers of {MAX_TOKENS}"
    note = f"{sizes}; the aim is 0.9 of the best at three times the load"
    show("Overload", rows, [note])
    write_json(options.json, "overload", rows)


if __name__ == "__main__":
    main()
