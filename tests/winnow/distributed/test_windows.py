"""Two ranks of a model with windows give what one process gives."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models_in_code import save_tiny_model
from tests.winnow.distributed.conftest import TwoRanks, two_ranks
from tests.winnow.drive import (
    ASL,
    GREEDY,
    UNPRUNED,
    assert_empty,
    decode_all,
    ids,
    prefill_all,
    prompt,
    spec,
)
from winnow.decoder import DecoderModel
from winnow.engine.prefix.store import PrefixStore
from winnow.pruning_settings import PruningSettings

LONG = replace(GREEDY, max_tokens=50)
PRUNED = replace(ASL, min_layer=3, threshold=2.0, kv_budget=12)
RECOMPRESSED = {"decode_budget": 16, "recompress_interval": 4, "num_sequences": 2}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """Of six layers, of which 1, 3 and 5 are full; the others have windows longer than a budget."""
    kinds = ["sliding_attention", "full_attention"] * 3
    yield from two_ranks(
        save_tiny_model(
            tmp_path_factory.mktemp("windows"),
            "qwen2",
            num_hidden_layers=6,
            layer_types=kinds,
            use_sliding_window=True,
            sliding_window=20,
        )
    )


def answer(
    two: TwoRanks, settings: PruningSettings, *, is_split: bool, **request: Any
) -> list[list[int]]:
    """Of two prompts that begin alike, the second from the store: the tokens of each sequence."""
    model: DecoderModel = two.split if is_split else two.single
    store = PrefixStore(model, 16 << 20, block_tokens=16)
    engine = two.engine(is_split=is_split)
    answers = []
    for name in ("1", "2"):
        token_ids = prompt(50) + prompt(20, int(name))
        reservation = engine.reserve(spec(name, len(token_ids), LONG, **request))
        layers, result = prefill_all(model, token_ids, settings, store)
        for layer in layers:
            reservation.write_layer(layer)
        engine.start(reservation, result.final_hidden, result.report.next_position)
        tokens = decode_all(engine)[name]
        answers += [ids(tokens, idx) for idx in range(request.get("num_sequences", 1))]
    assert_empty(engine)
    return answers


@pytest.mark.parametrize(
    ("settings", "request_of"), [(UNPRUNED, {}), (PRUNED, {}), (PRUNED, RECOMPRESSED)]
)
def test_two_ranks_answer_as_one_process(
    two: TwoRanks, settings: PruningSettings, request_of: dict[str, Any]
) -> None:
    split = answer(two, settings, is_split=True, **request_of)
    assert split == answer(two, settings, is_split=False, **request_of)


def test_prefill_keeps_the_same_entries_of_the_same_tokens(two: TwoRanks) -> None:
    (single, one), (split, other) = (
        prefill_all(model, prompt(100), PRUNED) for model in (two.single, two.split)
    )
    assert other.report == one.report
    assert one.report.selection_layer == 3, "a layer with a window is above it"
    for ours, theirs in zip(split, single, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        torch.testing.assert_close(ours.keys, theirs.keys)
