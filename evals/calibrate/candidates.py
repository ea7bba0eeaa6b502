"""What is tried: settings as variants, and the grids that the search begins with."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from evals.variants import UNPRUNED, MethodSpec, Variant

if TYPE_CHECKING:
    from winnow.kv import ModelShape  # loads torch

WINDOW_SIZES = (8, 16, 32)
KERNEL_SIZES = (7, 15, 31, 63)
MAX_WINDOW = max(WINDOW_SIZES)
# ASL's thresholds. Above 1: the variance may have risen since min_layer.
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
# select_tokens, as shares of kv_budget: few tokens from a late layer on cost no more than many from
# an early one.
SELECT_SHARES = (0.25, 0.5, 1.0)

UNPRUNED_VARIANT = Variant(MethodSpec(UNPRUNED, UNPRUNED, MappingProxyType({})), None)


def variant(method: str, **options: Any) -> Variant:  # noqa: ANN401 - checked where it is used
    """A method with all that is not the default, under one text for the same options."""
    named = sorted(options.items())
    text = ":".join([method, *(f"{name}={_written(value)}" for name, value in named)])
    return Variant(MethodSpec(text, method, MappingProxyType(dict(named))), None)


def _written(value: object) -> str:
    return "null" if value is None else str(value)


@dataclass(frozen=True, slots=True)
class Budgets:
    """For prompts of `num_tokens` tokens: what each KV head keeps, and what may go on."""

    num_tokens: int
    kv_budget: int

    def select_tokens(self, window_size: int) -> list[int]:
        """Numbers of tokens to select, each above the window."""
        sizes = {round(share * self.kv_budget) for share in SELECT_SHARES}
        return sorted(size for size in sizes if window_size < size < self.num_tokens)


def kv_grid(budgets: Budgets, shape: "ModelShape") -> list[Variant]:
    """Every window and kernel that the model can have, without a selection."""
    longest = min(budgets.kv_budget - 1, shape.shortest_window or MAX_WINDOW)
    return [
        variant("snapkv", window_size=w, kernel_size=k, kv_budget=budgets.kv_budget)
        for w in WINDOW_SIZES
        for k in KERNEL_SIZES
        if w <= longest
    ]


def around(tried: Variant, grid: Sequence[Variant]) -> list[Variant]:
    """Those of the grid with the next window or the next kernel, and the variant itself."""

    def place(one: Variant) -> tuple[int, int]:
        options = one.spec.options
        return (
            WINDOW_SIZES.index(options["window_size"]),
            KERNEL_SIZES.index(options["kernel_size"]),
        )

    (row, column) = place(tried)
    return [
        one
        for one, (other_row, other_column) in zip(grid, map(place, grid), strict=True)
        if abs(row - other_row) + abs(column - other_column) <= 1
    ]


def layer_grid(shape: "ModelShape") -> list[int]:
    """Fixed layers: all in the middle third of the depth, every second one around it.

    A layer may find what its neighbours do not, so none of those that matter is left out. Of a
    model with other layers too, all full ones there are taken.
    """
    num_layers, full = shape.num_layers, shape.full_layers
    first, last = num_layers // 5, min(num_layers * 3 // 4, num_layers - 2)
    if len(full) < num_layers:
        return [layer for layer in full if first <= layer <= last] or [*full]
    middle = range(num_layers // 3, num_layers * 2 // 3 + 1)
    around = {*range(middle[0], first - 1, -2), *range(middle[-1], last + 1, 2)}
    return sorted(layer for layer in {*middle, *around} if layer <= last)


def fixed_layers(
    budgets: Budgets, observation: dict[str, Any], shape: "ModelShape"
) -> list[Variant]:
    """Every layer of the grid with every number of selected tokens.

    observation: window_size and kernel_size.
    """
    return [
        variant(
            "fastkv",
            fixed_layer=layer_idx,
            select_tokens=select_tokens,
            kv_budget=budgets.kv_budget,
            **observation,
        )
        for select_tokens in budgets.select_tokens(observation["window_size"])
        for layer_idx in layer_grid(shape)
    ]


def observed_layers(num_full: int) -> list[int]:
    """An eighth and a quarter of the full layers; the latter is the paper's 8 of 32.

    Two at least, where there are as many: over one the variance is 0.
    """
    return sorted({max(min(2, num_full), round(num_full / parts)) for parts in (8, 4)})


def observers(budgets: Budgets, observation: dict[str, Any], shape: "ModelShape") -> list[Variant]:
    """ASL that never selects: its rho says where it would, under any threshold."""
    return [
        variant(
            "asl",
            observed_layers=observed,
            min_layer=shape.full_layers[observed - 1],
            threshold=0,
            latest_layer=None,
            select_tokens=select_tokens,
            kv_budget=None,
            **observation,
        )
        for select_tokens in budgets.select_tokens(observation["window_size"])
        for observed in observed_layers(len(shape.full_layers))
    ]
