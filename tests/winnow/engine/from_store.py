"""Prefill with a store of small blocks, beside prefill from scratch."""

from collections.abc import Sequence

import pytest
import torch

from tests.winnow.drive import all_layers
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillResult, PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.kv import LayerKV
from winnow.pruning_settings import PruningSettings

BLOCK = 16
Prefilled = tuple[list[LayerKV], PrefillResult]


def make_store(
    model: DecoderModel, max_bytes: int = 64 << 20, location: str = "device"
) -> PrefixStore:
    """location: `device`, `host`, or `both`, with memory beside the model for a block or two."""
    device_bytes = 3 << 13 if location == "both" else 0
    location = "host" if location == "both" else location
    return PrefixStore(
        model, max_bytes, location=location, device_bytes=device_bytes, block_tokens=BLOCK
    )


def prefill(
    model: DecoderModel,
    token_ids: Sequence[int],
    pruning: PruningSettings,
    store: PrefixStore | None = None,
    cache_salt: str = "",
) -> Prefilled:
    run = PrefillRun(model, token_ids, pruning, store=store, cache_salt=cache_salt, is_long=False)
    layers = [layer for layer in all_layers(run) if layer is not None]
    return layers, run.result(keep_hidden=True)


def assert_same(one: Prefilled, other: Prefilled, atol: float = 1e-5) -> None:
    """Same layer, tokens and entries; in float32, the same numbers but for rounding."""
    (layers, result), (others, expected) = one, other
    report, wanted = result.report, expected.report
    assert report.selection_layer == wanted.selection_layer
    assert report.no_selection_reason == wanted.no_selection_reason
    assert report.num_selected_tokens == wanted.num_selected_tokens
    assert report.next_position == wanted.next_position
    assert report.layer_entries == wanted.layer_entries
    assert [layer for layer, _ in report.rho] == [layer for layer, _ in wanted.rho]
    assert [value for _, value in report.rho] == pytest.approx([value for _, value in wanted.rho])
    for layer, like in zip(layers, others, strict=True):
        assert layer.head_lengths == like.head_lengths
        assert torch.equal(layer.positions, like.positions)
        for name in ("keys", "values", "window_queries"):
            close(getattr(layer, name), getattr(like, name), atol)
    close(result.final_hidden, expected.final_hidden, atol)
    assert result.hidden is not None
    assert expected.hidden is not None
    close(result.hidden, expected.hidden, atol)


def close(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=atol)
