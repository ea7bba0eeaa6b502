"""Base classes of the rules that choose which KV entries are kept, after prefill and in decode."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from winnow.compression.heads import PagedHeads
from winnow.pruning_settings import PruningSettings, Recompression


class CompressionRule(ABC):
    """Which entries of a layer are kept after prefill, by the settings of one prompt."""

    follows_budget: ClassVar[bool] = False  # whether `kv_budget` sets the number of entries kept

    def __init__(self, settings: PruningSettings) -> None:
        self.settings = settings

    @abstractmethod
    def keeps_all(self, num_tokens: int) -> bool:
        """Whether all entries of a layer of `num_tokens` tokens are kept, which needs no scores."""

    @abstractmethod
    def max_entries(self, num_tokens: int, num_kv_heads: int) -> int:
        """The most entries that one KV head of a layer of `num_tokens` tokens can keep."""

    def keep(self, mass: Tensor, num_kv_heads: int) -> list[Tensor]:
        """Per KV head, the ascending indices of the entries to keep.

        mass: [num_heads, num_tokens] from `winnow.scoring.observed_attention`.
        Returns num_kv_heads tensors int64, which may differ in length.
        """
        num_tokens = mass.shape[1]
        if self.keeps_all(num_tokens):
            return [torch.arange(num_tokens, device=mass.device)] * num_kv_heads
        return self.keep_some(mass, num_kv_heads)

    @abstractmethod
    def keep_some(self, mass: Tensor, num_kv_heads: int) -> list[Tensor]:
        """As `keep`, for a layer that is not kept whole."""


class KeepAll(CompressionRule):
    """Keeps every entry."""

    def keeps_all(self, num_tokens: int) -> bool:
        return True

    def max_entries(self, num_tokens: int, num_kv_heads: int) -> int:
        return num_tokens

    def keep_some(self, mass: Tensor, num_kv_heads: int) -> list[Tensor]:
        raise AssertionError("every layer stays whole")


class BudgetRule(CompressionRule):
    """Keeps `kv_budget` entries per KV head, or on average over the KV heads of a layer."""

    follows_budget = True

    @property
    def kv_budget(self) -> int:
        """The setting, for a layer that is not kept whole."""
        assert self.settings.kv_budget is not None
        return self.settings.kv_budget

    def keeps_all(self, num_tokens: int) -> bool:
        budget = self.settings.kv_budget
        return budget is None or num_tokens <= budget

    def max_entries(self, num_tokens: int, num_kv_heads: int) -> int:
        return num_tokens if self.keeps_all(num_tokens) else self.kv_budget


class RecompressionRule(ABC):
    """What recompression in decode keeps of each KV head, by the settings of one request.

    How many entries stay is never the rule's choice, so the host knows it without waiting.
    """

    def __init__(self, settings: Recompression) -> None:
        self.settings = settings

    @abstractmethod
    def scores(self, heads: PagedHeads) -> Tensor:
        """How much each entry before its head's window should stay, of many heads at once.

        Returns [N, T] float32, of which any other entry is ignored; ties go to the earlier entry.
        Must not wait for the device.  Peak memory: some times [N, group, w, T].
        """
