from dataclasses import replace

from hypothesis import given
from torch import Tensor

from evals.calibrate.rule import Rule
from tests.winnow.selection.cases import masses_and_settings, run
from winnow.pruning_settings import PruningSettings


@given(masses_and_settings())
def test_rho_of_a_run_that_never_selects_says_where_any_threshold_would(
    case: tuple[list[Tensor], PruningSettings],
) -> None:
    masses, config = case
    config = replace(config, latest_layer=len(masses) - 1)
    selected, _, _ = run(masses, config)
    watching = replace(
        config, min_layer=config.observed_layers - 1, threshold=0.0, latest_layer=None
    )
    _, _, rho = run(masses, watching)
    rule = Rule(
        config.observed_layers,
        config.min_layer,
        config.threshold,
        len(masses) - 1,
        config.select_tokens,
    )
    assert rule.layer_for(rho) == selected
