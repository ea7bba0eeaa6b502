"""Recompression of one KV head alone."""

import torch
from torch import Tensor

from winnow.compression import recompression_rule
from winnow.compression.choice import REFERENCE
from winnow.compression.heads import PagedHeads
from winnow.compression.recompress import entries_to_keep
from winnow.pruning_settings import Recompression


def kept_of(keys: Tensor, queries: Tensor, budget: int, settings: Recompression) -> list[int]:
    """The entries that stay of a head in one page.  keys: [T, D].  queries: [group, w, D]."""
    heads = PagedHeads(
        queries=queries[None],
        keys=keys[None],
        pages=torch.zeros(1, 1, dtype=torch.int64),
        lengths=torch.tensor([len(keys)]),
        scaling=keys.shape[1] ** -0.5,
        kernels=REFERENCE,
    )
    rule = recompression_rule(settings)
    return entries_to_keep(heads, rule, torch.tensor([budget]), budget, budget)[0].tolist()
