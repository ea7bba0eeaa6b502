"""The `winnow` object of a request: pruning settings over the service's, under its caps."""

from collections.abc import Mapping
from typing import Any

from services.common.settings import Settings
from winnow import defaults
from winnow.errors import InvalidSetting
from winnow.request import PruningSettings


def changed_pruning(
    settings: Settings, service: PruningSettings, num_layers: int, changes: Mapping[str, Any]
) -> PruningSettings:
    """The service's pruning with a request's changes.

    Raises InvalidSetting, with `winnow.` before the parameter's name, for what cannot work with a
    model of `num_layers` or is over the operator's caps.
    """
    try:
        pruning = defaults.override(service, dict(changes))
        pruning.require_fits(num_layers)
        require_within_caps(settings, pruning)
    except InvalidSetting as error:
        param = f"winnow.{error.param}" if error.param else "winnow"
        raise InvalidSetting(error.message, param=param) from error
    return pruning


def require_within_caps(settings: Settings, pruning: PruningSettings) -> None:
    """Raises InvalidSetting for what is over an operator's cap.

    To select or compress nothing is to ask for everything, which is over any cap.
    """
    selects, compresses = pruning.selection != "none", pruning.compression == "snapkv"
    select_tokens = pruning.select_tokens if selects else None
    kv_budget = pruning.kv_budget if compresses else None
    _require_cap(
        "select_tokens",
        select_tokens,
        settings.max_select_tokens,
        param="select_tokens" if selects else "selection",
    )
    _require_cap(
        "kv_budget",
        kv_budget,
        settings.max_kv_budget,
        param="kv_budget" if compresses else "compression",
    )
    _require_cap(
        "decode_budget", pruning.decode_budget, settings.max_decode_budget, param="decode_budget"
    )


def _require_cap(name: str, value: int | None, cap: int | None, *, param: str) -> None:
    if cap is not None and (value is None or value > cap):
        shown = "unlimited" if value is None else f"{value:,}"
        raise InvalidSetting(
            f"{name} is {shown}; the operator's cap max_{name} is {cap:,}", param=param
        )
