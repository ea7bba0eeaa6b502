"""Layers as configurations name them."""

from types import SimpleNamespace
from typing import Any

import pytest

from winnow.errors import UnusableModel
from winnow.layers import FULL, Layer, layers_of


def config(**values: Any) -> Any:
    return SimpleNamespace(**values)


def test_a_configuration_without_kinds_has_full_layers() -> None:
    assert layers_of(config(), 3, 100) == (FULL,) * 3


def test_a_window_without_kinds_is_every_layers() -> None:
    assert layers_of(config(sliding_window=8), 2, 100) == (Layer("sliding", 8),) * 2


def test_kinds_are_those_of_the_configuration() -> None:
    kinds = ["sliding_attention", "chunked_attention", "linear_attention", "hybrid", "mlp", "conv"]
    found = layers_of(
        config(layer_types=kinds, sliding_window=8, attention_chunk_size=16), len(kinds), 100
    )
    assert [str(layer) for layer in found] == [
        *("sliding", "chunked", "recurrent", "full", "feed-forward", "recurrent")
    ]
    assert [layer.window for layer in found[:2]] == [8, 16]
    assert found[3].is_full and found[3].is_recurrent


def test_a_window_as_long_as_the_longest_sequence_is_none() -> None:
    assert layers_of(config(sliding_window=100), 1, 100) == (FULL,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 2}, "layer 0 is a sliding_attention layer, but"),
        ({"layer_types": ["full_attention"]}, "it has 1 layer_types for 2 layers"),
    ],
)
def test_what_cannot_be_run_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers_of(config(**values), 2, 100)


def test_a_kind_of_layer_that_is_not_known_is_refused() -> None:
    one = config(model_type="foo", layer_types=["full_attention", "indexed_attention"])
    with pytest.raises(UnusableModel, match=r"^Winnow cannot run foo: layer 1 is a indexed_att"):
        layers_of(one, 2, 100)


def test_the_first_position_that_a_token_sees() -> None:
    assert [FULL.first_visible(p) for p in (0, 9)] == [0, 0]
    assert [Layer("sliding", 4).first_visible(p) for p in (0, 3, 4, 9)] == [0, 0, 1, 6]
    assert [Layer("chunked", 4).first_visible(p) for p in (0, 3, 4, 9)] == [0, 0, 4, 8]
