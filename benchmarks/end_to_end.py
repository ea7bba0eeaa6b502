"""End-to-end benchmark: breakdown of TTFT, and throughput with many concurrent clients.

Starts `winnow serve` on the embedded model and calls it over HTTP. For each prompt length, with
pruning on (the model's own settings) and off, in turn, TTFT is split into: waiting for the engine,
prefill compute, transfer not hidden by compute, first step (which includes admission, the call to
prefill and joining the batch: the gateway's TTFT minus the former three), and HTTP (what the client
measures on top of the gateway). The floor of TTFT is prefill compute. Then concurrent streaming
clients, each with its own prompt: tokens per second against a single client. Last, a larger model
whose prefill and decode share the cores (benchmarks/shared_cores.py).
"""

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks import shared_cores
from benchmarks.client import TimedAnswer, complete, prompt_of
from benchmarks.report import arguments, show, write_json
from examples.demo import running_service

UNPRUNED = {"method": "full"}


async def split_ttft(
    client: httpx.AsyncClient, num_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """One row per setting, with medians over the rounds in milliseconds."""
    answers: dict[str, list[TimedAnswer]] = {"pruned": [], "unpruned": []}
    for seed in range(rounds + 1):
        prompt = await prompt_of(client, num_tokens, seed)
        for name, winnow in (("pruned", {}), ("unpruned", UNPRUNED)):
            answer = await complete(client, prompt, 8, winnow)
            if seed:  # the first round warms up
                answers[name].append(answer)
    slowest = median(answer.ttft_s for answer in answers["unpruned"])
    return [_ttft_row(num_tokens, name, found, slowest) for name, found in answers.items()]


def _ttft_row(
    num_tokens: int, name: str, answers: list[TimedAnswer], slowest: float
) -> dict[str, Any]:
    def part(field: str) -> float:
        return float(median(answer.usage["winnow"][field] for answer in answers)) * 1e3

    ttft = median(answer.ttft_s for answer in answers) * 1e3
    queue, prefill, exposed = part("queue_s"), part("prefill_s"), part("exposed_transfer_s")
    return {
        "tokens": num_tokens,
        "cache": name,
        "TTFT ms": ttft,
        "of unpruned": ttft / slowest / 1e3,
        "queue ms": queue,
        "prefill ms (floor)": prefill,
        "exposed transfer ms": exposed,
        "first step ms": part("ttft_s") - queue - prefill - exposed,
        "HTTP ms": ttft - part("ttft_s"),
        "exposed of prefill": exposed / prefill,
        "KV shipped MB": part("kv_bytes_kept") / 1e9,
    }


async def side_by_side(
    client: httpx.AsyncClient, counts: list[int], max_tokens: int
) -> list[dict[str, Any]]:
    """Tokens per second of all clients together, one row per number of clients."""
    rows: list[dict[str, Any]] = []
    for count in counts:
        prompts = [await prompt_of(client, 256, seed) for seed in range(count)]
        start = time.perf_counter()
        answers = await asyncio.gather(
            *(complete(client, prompt, max_tokens, {}) for prompt in prompts)
        )
        seconds = time.perf_counter() - start
        tokens = sum(answer.usage["completion_tokens"] for answer in answers)
        rows.append(
            {
                "clients": count,
                "complete": sum(a.usage["completion_tokens"] == max_tokens for a in answers),
                "tokens/s": tokens / seconds,
                "of one client": tokens
                / seconds
                / (rows[0]["tokens/s"] if rows else tokens / seconds),
                "median TTFT ms": median(answer.ttft_s for answer in answers) * 1e3,
            }
        )
    return rows


async def measure(url: str, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    lengths, rounds = ([1024], 2) if quick else ([512, 1024, 2048, 4096], 5)
    async with httpx.AsyncClient(
        base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)
    ) as client:
        ttft = [row for n in lengths for row in await split_ttft(client, n, rounds)]
        return ttft, await side_by_side(client, [1, 8] if quick else [1, 8, 64], 64)


def main() -> None:
    options = arguments("Time to first token and concurrent clients of the service.").parse_args()
    with running_service() as url:
        ttft, clients = asyncio.run(measure(url, options.quick))
    with tempfile.TemporaryDirectory() as folder:
        shared = shared_cores.compare(Path(folder), options.quick)
    show("Time to first token, embedded model", ttft, [__doc__ or ""])
    show("Streaming clients side by side, 256-token prompts, 64 tokens each", clients)
    show("Prefill and decode on the same cores, 0.5B shape", shared, [shared_cores.__doc__ or ""])
    write_json(options.json, "end_to_end", [*ttft, *clients, *shared])


if __name__ == "__main__":
    main()
