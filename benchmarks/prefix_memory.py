"""Memory of the prefix store against its setting: prompts that would fill it several times over."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.prefill import memory_bytes
from benchmarks.shapes import model_path
from winnow.defaults import scaled_defaults
from winnow.engine.prefill import PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.models import load_model

MAX_BYTES, PROMPT_TOKENS, TIMES_FULL = 256 << 20, 2048, 3


def memory(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """What the store says it takes, and what the process takes more than with a full pass alone."""
    model = load_model(model_path("tiny" if quick else "0.5b", folder))
    store = PrefixStore(model, MAX_BYTES)
    settings = scaled_defaults(model.shape)
    prompt_bytes = model.shape.kv_bytes(
        PROMPT_TOKENS * model.shape.num_layers * model.shape.num_kv_heads
    )
    _prefill(PrefillRun(model, _prompt(), settings, is_long=False))
    before = memory_bytes("VmRSS")
    most_used = 0
    for _ in range(1 + TIMES_FULL * MAX_BYTES // prompt_bytes):
        _prefill(PrefillRun(model, _prompt(), settings, store=store, is_long=False))
        most_used = max(most_used, store.stats().used_bytes)
    taken = memory_bytes("VmRSS") - before
    return [
        {
            "prefix_cache_bytes MB": MAX_BYTES / 2**20,
            "store at most MB": most_used / 2**20,
            "of the setting": most_used / MAX_BYTES,
            "process more MB": taken / 2**20,
            "more of the setting": taken / MAX_BYTES,
            "evicted blocks": store.stats().evicted_blocks,
        }
    ]


def _prompt() -> list[int]:
    return torch.randint(300, 500, (PROMPT_TOKENS,)).tolist()


def _prefill(run: PrefillRun) -> None:
    while not run.finished:
        run.compute_layer()
    run.result()
