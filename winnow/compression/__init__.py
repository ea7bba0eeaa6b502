"""Which KV entries of a layer survive, per KV head. One method, one file.

To add a method: write its file, add its line to `kept_entries`, and its name to
`winnow.request.COMPRESSIONS`.
"""

import torch
from torch import Tensor

from winnow.compression import adakv
from winnow.compression.snapkv import keep_best
from winnow.compression.top_p import keep_mass
from winnow.request import PruningSettings

__all__ = ["follows_budget", "keeps_all", "kept_entries", "max_entries"]


def follows_budget(settings: PruningSettings) -> bool:
    """Whether `kv_budget` says how many entries survive."""
    return settings.compression not in ("top_p", "none")


def max_entries(settings: PruningSettings, num_tokens: int, num_kv_heads: int) -> int:
    """KV entries that one KV head of a layer of `num_tokens` tokens can keep at most."""
    if keeps_all(settings, num_tokens) or not follows_budget(settings):
        return num_tokens
    assert settings.kv_budget is not None
    if settings.compression == "adakv":
        return adakv.most_entries(
            num_tokens, num_kv_heads, settings.window_size, settings.kv_budget
        )
    return settings.kv_budget


def keeps_all(settings: PruningSettings, num_tokens: int) -> bool:
    """Whether a layer of `num_tokens` tokens stays whole, so that no scores are needed."""
    if num_tokens <= settings.window_size or settings.compression == "none":
        return True
    if settings.compression == "top_p":
        return settings.kv_top_p >= 1
    return settings.kv_budget is None or num_tokens <= settings.kv_budget


def kept_entries(mass: Tensor, num_kv_heads: int, settings: PruningSettings) -> list[Tensor]:
    """Per KV head, the ascending indices of the entries that survive.

    mass: [num_heads, num_tokens] from `winnow.scoring.observed_attention`.
    """
    num_tokens = mass.shape[1]
    if keeps_all(settings, num_tokens):
        return [torch.arange(num_tokens, device=mass.device)] * num_kv_heads
    if settings.compression == "top_p":
        return keep_mass(mass, num_kv_heads, settings.window_size, settings.kv_top_p)
    assert settings.kv_budget is not None
    keep = adakv.keep_shared if settings.compression == "adakv" else keep_best
    return keep(mass, num_kv_heads, settings.window_size, settings.kernel_size, settings.kv_budget)
