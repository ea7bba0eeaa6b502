import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.winnow import naive
from tests.winnow.selection.cases import masses_and_settings, run
from winnow.pruning_settings import PruningSettings
from winnow.scoring import descending_order
from winnow.selection import best_tokens, most_relevant, relevance, token_scores

BASE = PruningSettings(
    select_tokens=12, window_size=4, kernel_size=3, observed_layers=2, min_layer=2, threshold=0.3
)


@settings(max_examples=300)
@given(masses_and_settings())
def test_asl_equals_the_formulas(case: tuple[list[Tensor], PruningSettings]) -> None:
    masses, config = case
    layer, chosen, rho = run(masses, config)
    expected = naive.Asl(
        [naive.as_lists(mass) for mass in masses],
        window=config.window_size,
        kernel_size=config.kernel_size,
        select_tokens=config.select_tokens,
        observed_layers=config.observed_layers,
        min_layer=config.min_layer,
        threshold=config.threshold,
        latest_layer=config.latest_layer,
    )
    assert layer == expected.selection_layer
    assert (None if chosen is None else chosen.tolist()) == expected.kept
    assert [at for at, _ in rho] == [at for at, _ in expected.rho]
    assert [v for _, v in rho] == pytest.approx([v for _, v in expected.rho], rel=1e-9)


def random_masses(num_tokens: int, num_layers: int = 6) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.rand(2, num_tokens) for _ in range(num_layers)]


def test_a_threshold_never_met_selects_nothing() -> None:
    assert run(random_masses(30), replace(BASE, threshold=0.0))[:2] == (None, None)


def test_latest_layer_selects_when_the_threshold_was_not_met() -> None:
    layer, chosen, _ = run(random_masses(30), replace(BASE, threshold=0.0, latest_layer=4))
    assert layer == 4
    assert chosen is not None and len(chosen) == BASE.select_tokens


def test_ranks_that_had_settled_before_min_layer_select_right_after_it() -> None:
    masses = [random_masses(30)[0]] * 6
    layer, _, rho = run(masses, BASE)
    assert (layer, rho) == (3, ((2, 1.0), (3, 0.0)))


def test_ranks_that_had_settled_and_move_again_select_nothing_at_a_rho_that_is_a_number() -> None:
    settled, moved, _ = random_masses(30, 3)
    layer, _, rho = run([settled, settled, settled, moved], BASE)
    assert layer is None
    assert 1e6 < rho[-1][1] < math.inf


def test_the_best_tokens_of_one_layer_and_the_window_are_the_formulas() -> None:
    mass = random_masses(30)[3]
    chosen = best_tokens(descending_order(token_scores(mass, BASE)), BASE)
    expected = naive.Asl(
        [naive.as_lists(mass)],
        window=4,
        kernel_size=3,
        select_tokens=12,
        observed_layers=1,
        min_layer=0,
        threshold=2.0,
    )
    assert chosen.tolist() == expected.kept


@settings(max_examples=200)
@given(
    num_tokens=st.integers(2, 40),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    largest=st.sampled_from([1, 3, 50]),  # few values: many ties
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_gemfilters_choice_equals_the_formula(
    num_tokens: int, num_kv_heads: int, group: int, largest: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (num_kv_heads, num_tokens, 2)
    keys = 5 * torch.randint(-largest, largest + 1, size, generator=generator).float()
    query = torch.randint(-3, 4, (num_kv_heads * group, 2), generator=generator).float()
    select_tokens = data.draw(st.integers(1, num_tokens - 1))
    raw = torch.einsum("hd,hnd->hn", query, keys.repeat_interleave(group, 0))
    expected = naive.gemfilter(naive.as_lists(raw), select_tokens)
    assert most_relevant(relevance(query, keys), select_tokens).tolist() == expected
