from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.winnow import naive
from winnow import selection
from winnow.request import PruningSettings
from winnow.selection import Selection

BASE = PruningSettings(
    select_tokens=12, window_size=4, kernel_size=3, observed_layers=2, min_layer=2, threshold=0.3
)
# Multiples of 105 = 3 * 5 * 7 make every pooled score a whole number: no rounding, many ties.
UNIT = 105


def run(
    masses: list[Tensor], config: PruningSettings
) -> tuple[int | None, Selection | None, tuple]:
    selector = selection.create(config, masses[0].shape[1])
    for layer_idx, mass in enumerate(masses):
        if selector.needs_scores(layer_idx):
            chosen = selector.observe(layer_idx, mass)
            if chosen is not None:
                return layer_idx, chosen, selector.rho
    return None, None, selector.rho


@st.composite
def masses_and_settings(draw: st.DrawFn) -> tuple[list[Tensor], PruningSettings]:
    window = draw(st.integers(1, 4))
    num_tokens = draw(st.integers(window + 1, 40))
    num_layers, num_heads = draw(st.integers(2, 7)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    largest = draw(st.sampled_from([2, 5, 1000]))  # few values: many ties
    settles_at = draw(st.integers(0, num_layers))  # structured: later layers repeat this one
    masses = [
        torch.randint(0, largest, (num_heads, num_tokens), generator=generator).float() * UNIT
        for _ in range(num_layers)
    ]
    masses = [masses[min(idx, settles_at)] for idx in range(num_layers)]
    observed = draw(st.integers(1, num_layers))
    min_layer = draw(st.integers(observed - 1, num_layers - 1))
    config = PruningSettings(
        select_tokens=draw(st.integers(window + 1, 41)),
        window_size=window,
        kernel_size=draw(st.sampled_from([1, 3, 5, 7])),
        observed_layers=observed,
        min_layer=min_layer,
        threshold=draw(st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.5])),
        latest_layer=draw(st.none() | st.integers(min_layer, num_layers - 1)),
    )
    return masses, config


@settings(max_examples=300, deadline=None)
@given(masses_and_settings())
def test_asl_equals_the_formulas(case: tuple[list[Tensor], PruningSettings]) -> None:
    masses, config = case
    layer, chosen, rho = run(masses, config)
    if masses[0].shape[1] <= config.select_tokens:
        assert (layer, chosen, rho) == (None, None, ())
        return
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
    assert (chosen.kept.tolist() if chosen else None) == expected.kept
    assert [at for at, _ in rho] == [at for at, _ in expected.rho]
    assert [v for _, v in rho] == pytest.approx([v for _, v in expected.rho], rel=1e-9)


def random_masses(num_tokens: int, num_layers: int = 6) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.rand(2, num_tokens) for _ in range(num_layers)]


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 12])
@pytest.mark.parametrize("method", ["asl", "fixed"])
def test_prompts_up_to_select_tokens_are_not_cut(num_tokens: int, method: str) -> None:
    selector = selection.create(replace(BASE, selection=method, fixed_layer=1), num_tokens)
    assert selector.no_selection_reason == "short_prompt"
    assert not any(selector.needs_scores(layer) for layer in range(6))


def test_a_threshold_never_met_selects_nothing() -> None:
    config = replace(BASE, threshold=0.0)
    assert run(random_masses(30), config)[:2] == (None, None)
    assert selection.create(config, 30).no_selection_reason == "threshold_not_met"


def test_latest_layer_selects_when_the_threshold_was_not_met() -> None:
    layer, chosen, _ = run(random_masses(30), replace(BASE, threshold=0.0, latest_layer=4))
    assert layer == 4
    assert chosen is not None and len(chosen.kept) == BASE.select_tokens


def test_ranks_that_had_settled_before_min_layer_select_right_after_it() -> None:
    masses = [random_masses(30)[0]] * 6
    layer, _, rho = run(masses, BASE)
    assert (layer, rho) == (3, ((2, 1.0), (3, 0.0)))


def test_fixed_selects_the_best_of_its_layer_and_the_window() -> None:
    masses = random_masses(30)
    layer, chosen, _ = run(masses, replace(BASE, selection="fixed", fixed_layer=3))
    expected = naive.Asl(
        [naive.as_lists(masses[3])],
        window=4,
        kernel_size=3,
        select_tokens=12,
        observed_layers=1,
        min_layer=0,
        threshold=2.0,
    )
    assert layer == 3
    assert chosen is not None and chosen.kept.tolist() == expected.kept


def test_off_selects_nothing() -> None:
    selector = selection.create(replace(BASE, selection="none"), 1000)
    assert selector.no_selection_reason == "off"
    assert not selector.needs_scores(3)
