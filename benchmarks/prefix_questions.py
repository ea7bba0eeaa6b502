"""Questions about one document: time to first token of the first question, and of later ones.

Contestants: the service, unpruned and pruned, with its prefix cache; transformers, which keeps the
document's KV cache and crops it after each answer; and a peer's service, where its URL is given.
The floor of a later question is the share of the prompt's layer-tokens that it computes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.client import complete
from benchmarks.shapes import model_path
from examples.demo import running_service

MODEL, QUESTION_TOKENS, NUM_LATER, MAX_TOKENS = "0.5b", 64, 3, 4
CACHE_BYTES = "2GiB"
PRUNED: dict[str, Any] = {"method": "asl", "threshold": 0.0, "latest_layer": 11, "min_layer": 7}

# Seconds to the first token of a prompt, and the layer-tokens computed if they are known.
Ask = Callable[[list[int]], Awaitable[tuple[float, float | None]]]


def questions(folder: Path, quick: bool, peer_url: str | None) -> list[dict[str, Any]]:
    """A row per document length and contestant."""
    lengths, rounds = ([1024], 1) if quick else ([2000, 4000, 8000], 3)
    path = model_path(MODEL, folder)
    with running_service("--model", str(path), "--prefix-cache-bytes", CACHE_BYTES) as url:
        return asyncio.run(_compare(path, url, peer_url, lengths, rounds))


async def _compare(
    path: Path, url: str, peer_url: str | None, lengths: list[int], rounds: int
) -> list[dict[str, Any]]:
    rows, transformers = [], _transformers(path)
    async with (
        httpx.AsyncClient(base_url=url, timeout=600) as ours,
        httpx.AsyncClient(base_url=peer_url or url, timeout=600) as peers,
    ):
        for num_tokens in lengths:
            sizes = {"select_tokens": num_tokens // 8, "kv_budget": num_tokens // 8}
            contestants = {
                "winnow unpruned": _service(ours, MODEL, {"method": "full"}),
                "winnow pruned": _service(ours, MODEL, PRUNED | sizes),
                "transformers": transformers,
            }
            if peer_url is not None:
                contestants["peer"] = _service(peers, await _model_of(peers), None)
            found: dict[str, list[tuple[float, float, float | None]]] = {n: [] for n in contestants}
            for round_idx in range(rounds + 1):
                for name, ask in contestants.items():
                    timed = await _ask_in_turn(ask, num_tokens)
                    if round_idx:  # the first round warms up
                        found[name].append(timed)
            rows += [_row(num_tokens, name, timed) for name, timed in found.items()]
    return rows


async def _ask_in_turn(ask: Ask, num_tokens: int) -> tuple[float, float, float | None]:
    """Seconds of the first question and of the later ones, and the latter's computed share."""
    document = _random_tokens(num_tokens - QUESTION_TOKENS)
    first_s, _ = await ask(document + _random_tokens(QUESTION_TOKENS))
    later = [await ask(document + _random_tokens(QUESTION_TOKENS)) for _ in range(NUM_LATER)]
    return first_s, median(seconds for seconds, _ in later), later[-1][1]


def _random_tokens(count: int) -> list[int]:
    return torch.randint(1000, 30_000, (count,)).tolist()


def _service(client: httpx.AsyncClient, model: str, pruning: dict[str, Any] | None) -> Ask:
    """pruning: None for a service that knows none."""

    async def ask(prompt: list[int]) -> tuple[float, float | None]:
        answer = await complete(client, prompt, MAX_TOKENS, pruning, model)
        told = answer.usage.get("winnow")
        return answer.ttft_s, None if told is None else told["computed_share"]

    return ask


async def _model_of(client: httpx.AsyncClient) -> str:
    response = await client.get("/v1/models")
    return str(response.raise_for_status().json()["data"][0]["id"])


def _transformers(path: Path) -> Ask:
    """Its own way: a cache that is cropped to where the next prompt differs."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    cache, cached = DynamicCache(config=model.config), list[int]()

    @torch.inference_mode()
    def prefill(prompt: list[int]) -> None:
        nonlocal cached
        common = next(
            (idx for idx, (a, b) in enumerate(zip(prompt, cached, strict=False)) if a != b),
            min(len(cached), len(prompt) - 1),
        )
        if common < len(cached):
            cache.crop(common - len(cached))
        model(torch.tensor([prompt[common:]]), past_key_values=cache, logits_to_keep=1)
        cached = prompt

    async def ask(prompt: list[int]) -> tuple[float, float | None]:
        start_s = time.perf_counter()
        await asyncio.to_thread(prefill, prompt)
        return time.perf_counter() - start_s, None

    return ask


def _row(
    num_tokens: int, name: str, timed: list[tuple[float, float, float | None]]
) -> dict[str, Any]:
    first_s, later_s = median(first for first, _, _ in timed), median(s for _, s, _ in timed)
    floor = timed[-1][2]
    return {
        "tokens": num_tokens,
        "contestant": name,
        "first s": first_s,
        "later s": later_s,
        "of the first": later_s / first_s,
        "floor, of unpruned": "" if floor is None else f"{floor:.3f}",
    }
