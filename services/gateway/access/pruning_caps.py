"""Pruning settings of a request: its `winnow` object over the service's settings, within caps."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from services.common.settings import Settings
from winnow import defaults
from winnow.errors import InvalidSetting
from winnow.kv import ModelShape
from winnow.methods import method_class
from winnow.methods.base import Bound
from winnow.pruning_settings import PruningSettings

# The settings that an operator's `max_...` bounds.
CAPPED = ("select_tokens", "kv_budget", "decode_budget")


def changed_pruning(
    settings: Settings, service: PruningSettings, shape: ModelShape, changes: Mapping[str, Any]
) -> PruningSettings:
    """The service's pruning settings with a request's changes.

    Raises InvalidSetting, with `winnow.` before the parameter's name, for settings that cannot work
    with a model of this shape or that exceed the operator's caps.
    """
    try:
        pruning = defaults.override_for(service, changes, shape)
        require_within_caps(settings, pruning)
    except InvalidSetting as error:
        param = f"winnow.{error.param}" if error.param else "winnow"
        raise InvalidSetting(error.message, param=param) from error
    return pruning


def unpruned(
    settings: Settings, pruning: PruningSettings, reason: str, param: str
) -> PruningSettings:
    """The settings with the whole prompt kept.  Raises InvalidSetting if that exceeds a cap.

    reason, param: what the request asks for that needs it.
    """
    try:
        pruning = replace(pruning, method="full")
        require_within_caps(settings, pruning)
    except InvalidSetting as error:
        raise InvalidSetting(f"{reason}: {error.message}", param=param) from error
    return pruning


def require_within_caps(settings: Settings, pruning: PruningSettings) -> None:
    """Raises InvalidSetting for a setting over an operator's cap.

    Without selection or compression the number is unlimited, which exceeds any cap.
    """
    method = method_class(pruning.method)
    bounds = {
        "select_tokens": method.token_bound(pruning),
        "kv_budget": method.entry_bound(pruning),
        "decode_budget": Bound(pruning.decode_budget, "decode_budget"),
    }
    for name, bound in bounds.items():
        cap = getattr(settings, f"max_{name}")
        if cap is not None and (bound.limit is None or bound.limit > cap):
            raise InvalidSetting(
                f"{_shown(name, bound, pruning)}; the operator's cap max_{name} is {cap:,}",
                param=bound.setting,
            )


def _shown(name: str, bound: Bound, pruning: PruningSettings) -> str:
    """`kv_budget is 2,048`, or `kv_budget is unlimited with compression none`."""
    amount = "unlimited" if bound.limit is None else f"{bound.limit:,}"
    if bound.setting == name:
        return f"{name} is {amount}"
    return f"{name} is {amount} with {bound.setting} {getattr(pruning, bound.setting)}"
