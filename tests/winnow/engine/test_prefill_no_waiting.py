"""Prefill, and its layers' way to the network, on a device that the host never waits for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models_in_code import FAMILIES
from tests.winnow.drive import ASL, prefill_all, prompt
from tests.winnow.no_waiting import META, no_waiting
from winnow.decoder import DecoderModel
from winnow.engine.outgoing import Outgoing, OutgoingBuffers
from winnow.engine.prefill import PrefillResult, PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.score_watch import ScoreWatch
from winnow.kv import LayerKV
from winnow.models import load_model
from winnow.selection import AdaptiveSelection


class Copies:
    """As SideStream; its host memory has no content either."""

    def empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=META)

    def copy_out(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        return lambda: None


def on_meta(model: DecoderModel) -> DecoderModel:
    return DecoderModel(model._model.to(META), model.description, META)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method", ["full", "snapkv", "streaming", "h2o", "fastkv", "gemfilter", "asl"]
)
def test_no_layer_waits_for_the_device_nor_does_its_way_out(
    tiny_models: dict[str, Path], family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for one number of each layer from min_layer on, by which asl decides."""
    settings = replace(ASL, method=method, fixed_layer=1, threshold=0.5)
    expected, result = prefill_all(load_model(tiny_models[family]), prompt(60), settings)
    rho = dict(result.report.rho)
    variances = iter(rho.values())  # relative to the first, which is 1
    monkeypatch.setattr(AdaptiveSelection, "_variance", lambda _: next(variances))
    model, buffers = on_meta(load_model(tiny_models[family])), OutgoingBuffers(Copies(), 4)
    leaving: list[Outgoing[LayerKV | PrefillResult]] = []
    with no_waiting():
        watch = ScoreWatch(settings, 60, model.shape)
        run = PrefillRun(model, prompt(60), settings, watch, is_long=False)
        leaving += [buffers.copy(layer) for layer in run.layers()]
        leaving.append(buffers.copy(run.result()))
    for outgoing, own in zip(leaving, [*expected, result], strict=True):
        with outgoing as item:
            if isinstance(item, LayerKV) and isinstance(own, LayerKV):
                assert item.head_lengths == own.head_lengths
            elif isinstance(item, PrefillResult) and isinstance(own, PrefillResult):
                assert item.report == own.report
    assert buffers.num_used == 0


@pytest.mark.parametrize("method", ["full", "snapkv"])
def test_cached_blocks_beside_the_model_are_used_without_waiting(
    tiny_models: dict[str, Path], method: str
) -> None:
    """Also by two prompts at the same time, which grow the same blocks."""
    model = on_meta(load_model(tiny_models["qwen2"]))
    settings = replace(ASL, method=method)
    with no_waiting():
        store = PrefixStore(model, 1 << 20, block_tokens=16)
        for tails in ((10, 30), (20, 5)):
            runs = [
                PrefillRun(
                    model, prompt(40) + prompt(tail, tail), settings, store=store, is_long=False
                )
                for tail in tails
            ]
            for _ in range(model.shape.num_layers):
                for run in runs:
                    run.compute_layer()
            reports = [run.result().report for run in runs]
    assert [report.num_cached_tokens for report in reports] == [32, 32]
