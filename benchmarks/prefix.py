"""Prefill by turns: what prompts cost each other, and save each other.

Case `short_behind_long`: a short prompt arrives just after a long one, with the scheduler
(`max_open_prefills` as it is set by default) and without it (1). Its floor is its time to first
token alone; the aim is at most three layers of the long prompt above that, while the long one ends
no later than both would one after the other. Nothing is pruned, so all layers take equally long.
"""

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch

from benchmarks.client import TimedAnswer, complete
from benchmarks.report import arguments, show, write_json
from benchmarks.shapes import HALF_BILLION, model_path
from examples.demo import running_service
from services.common.settings import Settings

MODEL, MAX_TOKENS = "0.5b", 4
UNPRUNED = {"method": "full"}
SHORT_TOKENS, LAYERS_ALLOWED = 256, 3

Rows = list[dict[str, Any]]


def short_behind_long(folder: Path, quick: bool) -> Rows:
    """One row without the scheduler, and one with it."""
    long_tokens, rounds = (2048, 1) if quick else (8000, 3)
    path, rows = model_path(MODEL, folder), []
    for max_open in (1, Settings.model_fields["max_open_prefills"].default):
        arguments = ("--model", str(path), "--max-open-prefills", str(max_open))
        with running_service(*arguments) as url:
            rows.append(asyncio.run(_measure_behind(url, max_open, long_tokens, rounds)))
    return rows


async def _measure_behind(url: str, max_open: int, long_tokens: int, rounds: int) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def ask(num_tokens: int) -> TimedAnswer:
            prompt = torch.randint(0, 1000, (num_tokens,)).tolist()
            return await complete(client, prompt, MAX_TOKENS, UNPRUNED, MODEL)

        await ask(SHORT_TOKENS)  # warms up
        alone = [await ask(SHORT_TOKENS) for _ in range(3)]
        long_alone = [await ask(long_tokens) for _ in range(rounds)]
        layer_s = _median_prefill_s(long_alone) / HALF_BILLION["num_hidden_layers"]
        pairs = []
        for _ in range(rounds):
            long = asyncio.create_task(ask(long_tokens))
            await asyncio.sleep(2.5 * layer_s)  # in its first layers
            pairs.append((await ask(SHORT_TOKENS), await long))
    short_s, long_s = _median_ttft_s(alone), _median_ttft_s(long_alone)
    behind_s = _median_ttft_s([short for short, _ in pairs])
    beside_s = _median_ttft_s([long for _, long in pairs])
    return {
        "max_open_prefills": max_open,
        "long tokens": long_tokens,
        "short alone s (floor)": short_s,
        "behind long s": behind_s,
        "of the floor": behind_s / short_s,
        "long layers more": (behind_s - short_s) / layer_s,
        "aim": LAYERS_ALLOWED,
        "long alone s": long_s,
        "beside short s": beside_s,
        "of the sum": beside_s / (long_s + short_s),
    }


def _median_ttft_s(answers: list[TimedAnswer]) -> float:
    return median(answer.ttft_s for answer in answers)


def _median_prefill_s(answers: list[TimedAnswer]) -> float:
    return float(median(answer.usage["winnow"]["prefill_s"] for answer in answers))


CASES: dict[str, Callable[[Path, bool], Rows]] = {"short_behind_long": short_behind_long}


def main() -> None:
    parser = arguments("what prompts cost each other in prefill, and save each other")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    found: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            rows = CASES[name](Path(folder), options.quick)
            show(name.replace("_", " "), rows)
            found += [{"case": name} | row for row in rows]
    print(__doc__)
    write_json(options.json, "prefix", found)


if __name__ == "__main__":
    main()
