"""Prefill and decode sharing cores, against what each takes alone.

Clients send requests at the same time, each with its own prompt. The sum of the parts is the time
one worker would need for the prompts one after the other, then the decode steps of all answers
together. The parts are measured first, in their own process with a worker's OpenMP settings.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch

from benchmarks.client import TimedAnswer, complete
from benchmarks.decode import our_step, seconds_per_step
from benchmarks.prefill import measure, settings_for
from benchmarks.shapes import model_path
from examples.demo import running_service
from services.common.openmp import SHORT_WAITS
from winnow.kv import ModelShape
from winnow.model_files import describe_model
from winnow.models import load_model

MODEL, METHOD = "0.5b", "fastkv"


@dataclass(frozen=True)
class Case:
    clients: int
    prompt_tokens: int
    answer_tokens: int


QUICK, WHOLE = Case(4, 512, 16), Case(8, 2048, 64)


@dataclass(frozen=True)
class Parts:
    """Seconds of one prefill, and of one decode step of all clients, each measured alone."""

    prefill_s: float
    step_s: float

    def sum_s(self, case: Case) -> float:
        return case.clients * self.prefill_s + case.answer_tokens * self.step_s


def measure_parts(path: Path, case: Case) -> Parts:
    prefill_s = median(measure(path, METHOD, case.prompt_tokens, rounds=3)["seconds"])
    model = load_model(path, dtype="bfloat16")
    entries = settings_for(METHOD, model.shape, case.prompt_tokens).kv_budget
    assert entries is not None
    step = our_step(model, case.clients, entries, 4 * case.answer_tokens)
    return Parts(prefill_s, seconds_per_step(step, case.answer_tokens))


def measure_parts_apart(path: Path, case: Case) -> Parts:
    command = [sys.executable, "-m", "benchmarks.shared_cores", str(path), *map(str, astuple(case))]
    environment = os.environ | SHORT_WAITS
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return Parts(**json.loads(done.stdout.splitlines()[-1]))


async def measure_service(
    url: str, case: Case, shape: ModelShape
) -> tuple[float, list[TimedAnswer]]:
    """Seconds for all clients together, and their answers."""
    settings = settings_for(METHOD, shape, case.prompt_tokens)
    names = ("method", "fixed_layer", "select_tokens", "kv_budget")
    winnow = {name: getattr(settings, name) for name in names}
    prompts = torch.randint(0, 1000, (case.clients + 1, case.prompt_tokens)).tolist()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def ask(prompt: list[int]) -> TimedAnswer:
            return await complete(client, prompt, case.answer_tokens, winnow, MODEL)

        await ask(prompts.pop())  # warms up
        start_s = time.perf_counter()
        answers = await asyncio.gather(*map(ask, prompts))
        return time.perf_counter() - start_s, answers


def compare(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """The benchmark's result, in one row."""
    case, path = QUICK if quick else WHOLE, model_path(MODEL, folder)
    parts = measure_parts_apart(path, case)
    shape = describe_model(path).shape
    with running_service("--model", str(path)) as url:
        service_s, answers = asyncio.run(measure_service(url, case, shape))
    last_prompt_s = max(answer.ttft_s for answer in answers)
    beside, alone = _paces(answers, last_prompt_s)
    return [
        asdict(case)
        | {
            "prefill s": parts.prefill_s,
            "step ms": parts.step_s * 1e3,
            "sum s": parts.sum_s(case),
            "service s": service_s,
            "of the sum": service_s / parts.sum_s(case),
            "token ms beside a prompt": median(beside) * 1e3,
            "longest": max(beside) * 1e3,
            "afterwards": median(alone) * 1e3,
        }
    ]


def _paces(answers: list[TimedAnswer], last_prompt_s: float) -> tuple[list[float], list[float]]:
    """Inter-token seconds while prefill was running, and afterwards."""
    beside: list[float] = []
    alone: list[float] = []
    for before_s, after_s in _gaps(answers):
        (beside if after_s < last_prompt_s else alone).append(after_s - before_s)
    return beside, alone


def _gaps(answers: list[TimedAnswer]) -> Iterator[tuple[float, float]]:
    for answer in answers:
        yield from zip(answer.times_s, answer.times_s[1:], strict=False)


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    print(json.dumps(asdict(measure_parts(Path(path), Case(*map(int, numbers))))))
