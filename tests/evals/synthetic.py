"""Records of a run that never was: scores, layers and ρ drawn from a seeded generator."""

import random
from collections.abc import Sequence

from evals.records import Record

TASKS = ("niah_single_1", "niah_multikey_2", "vt", "passkey", "niah")
LENGTHS = (1024, 2048)
VARIANTS = (
    ("full", None),
    *(
        (method, budget)
        for method in ("snapkv", "fastkv:fixed_layer=5", "gemfilter", "asl")
        for budget in (64, 128, 256)
    ),
)
NUM_LAYERS = 16


def make_records(
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = LENGTHS,
    variants: Sequence[tuple[str, int | None]] = VARIANTS,
    num_samples: int = 11,
) -> list[Record]:
    return [
        _record(task, length, index, method, budget)
        for index in range(num_samples)
        for length in lengths
        for task in tasks
        for method, budget in variants
    ]


def _record(task: str, length: int, index: int, method: str, budget: int | None) -> Record:
    rng = random.Random(f"{task} {length} {index} {method} {budget}")
    rho = _rho(rng, task) if method.startswith("asl") else ()
    layer = rho[-1][0] if rho and rho[-1][1] < 0.4 else 5 if method.startswith("fastkv") else None
    share = 1.0 if layer is None else (layer + 1) / NUM_LAYERS
    score = float(rng.random() < 0.4 + 0.1 * len(task) / 4 * (budget or 512) / 256)
    kept = 1.0 if budget is None else budget / length
    return Record(
        task=task,
        length=length,
        index=index,
        method=method,
        budget=budget,
        depth=index % 11 / 10 if task == "niah" else None,
        answer=f" {rng.randrange(10**7)}.",
        references=(str(rng.randrange(10**7)),),
        score=score,
        num_prompt_tokens=length - 3,
        num_answer_tokens=9,
        selection_layer=layer,
        no_selection_reason="off" if layer is None else None,
        rho=rho,
        computed_share=share,
        kv_bytes_full=length * 1000,
        kv_bytes_kept=int(length * 1000 * kept),
        prefill_s=0.2 * share,
        seconds=0.5,
    )


def _rho(rng: random.Random, task: str) -> tuple[tuple[int, float], ...]:
    """Falls from 1 at layer 3, slower for tasks with long names, until it is below 0.4."""
    values = [(3, 1.0)]
    while values[-1][1] >= 0.4 and values[-1][0] < NUM_LAYERS - 1:
        layer, rho = values[-1]
        values.append((layer + 1, rho * (1 - rng.random() * 3 / len(task))))
    return tuple(values)
