"""Prefill of long prompts: ASL and FastKV beside the whole computation and transformers.

Both select an eighth of the tokens at half depth (ASL by `latest_layer`, so its time includes
watching the ranks). On CUDA the whole computation is repeated with each attention of PyTorch's.
`first s` is the time of a length's first prompt, which includes what is planned or compiled for it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend

from benchmarks.on_device.model import as_decoder, fuse, random_network
from benchmarks.on_device.section import Bench, Figure, Result, attempt, measured
from benchmarks.on_device.timing import seconds_per_call, wall_seconds
from benchmarks.prefill import THEIRS, UNPRUNED, settings_for
from winnow.attention import fused
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillRun

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
_TARGET_TOKENS = 32_768

Prefill = Callable[[list[int]], object]


def their_prefill(network: Any, bench: Bench) -> Prefill:  # noqa: ANN401
    @torch.inference_mode()
    def prefill(token_ids: list[int]) -> object:
        tokens = torch.tensor([token_ids], device=bench.device)
        return float(network(tokens, use_cache=True, logits_to_keep=1).logits[0, -1, 0])

    return prefill


def our_prefill(model: DecoderModel, method: str) -> Prefill:
    def prefill(token_ids: list[int]) -> object:
        settings = settings_for(method, model.shape, len(token_ids))
        run = PrefillRun(
            model, token_ids, settings, is_long=model.description.is_long(len(token_ids))
        )
        while not run.finished:
            run.compute_layer()  # its KV is dropped here
        return float(model.logits(run.result().final_hidden[None])[0, 0])

    return prefill


def measure(bench: Bench) -> Result:
    rows = list(_rows(bench))
    for row in rows:
        whole = measured(rows, "s", tokens=row["tokens"], method=UNPRUNED, attention="default")
        if whole and "s" in row:
            row["of unpruned"] = row["s"] / whole[0]
    figures = [
        Figure(
            f"prefill of {tokens:,} tokens with ASL, of unpruned",
            share,
            at_most=0.6 if tokens == _TARGET_TOKENS else None,
        )
        for tokens in bench.scale.prompts
        for share in measured(rows, "of unpruned", tokens=tokens, method="asl")
    ]
    return Result(rows, figures)


def _rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """The one of transformers first: the network is Winnow's afterwards."""
    network = random_network(bench)
    yield from _with(their_prefill(network, bench), THEIRS, bench)
    model = as_decoder(network, bench)
    fuse(network, bench)
    for method in (UNPRUNED, "fastkv", "asl"):
        yield from _with(our_prefill(model, method), method, bench)
    for name in BACKENDS:
        yield from _with(our_prefill(model, UNPRUNED), UNPRUNED, bench, name)


def _with(
    prefill: Prefill, method: str, bench: Bench, attention: str = "default"
) -> Iterator[dict[str, Any]]:
    for num_tokens in bench.scale.prompts:
        labels = {"method": method, "tokens": num_tokens, "attention": attention}
        yield attempt(labels, partial(_row, prefill, bench, num_tokens, attention))


def _row(prefill: Prefill, bench: Bench, num_tokens: int, attention: str) -> dict[str, float]:
    chosen: AbstractContextManager[object] = nullcontext()
    if attention != "default":
        bench.require_cuda()
        chosen = patch.object(fused, "kernel_order", lambda **_: [BACKENDS[attention]])
    token_ids = torch.randint(0, bench.scale.model["vocab_size"], (num_tokens,)).tolist()
    with chosen:
        first = wall_seconds(lambda: prefill(token_ids))
        seconds = seconds_per_call(lambda: prefill(token_ids), 1, bench.scale.rounds)
    return {"s": seconds, "tokens/s": num_tokens / seconds, "first s": first}
