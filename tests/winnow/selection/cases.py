"""Layers of attention masses with settings, and ASL over them."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.winnow.naive import UNIT
from winnow.pruning_settings import PruningSettings
from winnow.selection import AdaptiveSelection


def run(
    masses: list[Tensor], config: PruningSettings
) -> tuple[int | None, Tensor | None, tuple[tuple[int, float], ...]]:
    """The layer at which ASL selects, the tokens, and rho."""
    selection = AdaptiveSelection(config, config.latest_layer, range(len(masses)))
    for layer_idx, mass in enumerate(masses):
        if selection.needs_scores(layer_idx):
            chosen = selection.observe(layer_idx, mass)
            if chosen is not None:
                return layer_idx, chosen, selection.rho
    return None, None, selection.rho


@st.composite
def masses_and_settings(draw: st.DrawFn) -> tuple[list[Tensor], PruningSettings]:
    window = draw(st.integers(1, 4))
    select_tokens = draw(st.integers(window + 1, 39))
    num_tokens = draw(st.integers(select_tokens + 1, 40))
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
        select_tokens=select_tokens,
        window_size=window,
        kernel_size=draw(st.sampled_from([1, 3, 5, 7])),
        observed_layers=observed,
        min_layer=min_layer,
        threshold=draw(st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.5])),
        latest_layer=draw(st.none() | st.integers(min_layer, num_layers - 1)),
    )
    return masses, config
