"""R-KV (arXiv 2505.24133): keeps entries that are attended to and not redundant."""

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.compression.base import RecompressionRule
from winnow.scoring import descending_order, with_window

_SIMILAR = 0.5  # T in the authors' code; the paper gives neither it nor beta, which is 1 there
_BLOCK_SIZE = 1024


class RKVRecompression(RecompressionRule):
    """Trades attention against redundancy by `redundancy_weight`."""

    def keep(self, keys: Tensor, queries: Tensor, scaling: float, num_kept: int) -> Tensor:
        return keep_diverse(
            keys,
            queries,
            scaling,
            self.settings.kernel_size,
            num_kept,
            self.settings.redundancy_weight,
        )


def keep_diverse(
    keys: Tensor,
    window_queries: Tensor,
    scaling: float,
    kernel_size: int,
    kv_budget: int,
    redundancy_weight: float,
) -> Tensor:
    """The `kv_budget - w` entries of one KV head with the highest lambda I - (1 - lambda) R, and
    the window, ascending.

    keys: [num_entries, head_dim], num_entries > kv_budget > w.
    window_queries: [group, w, head_dim], of the tokens of the last w entries.
    redundancy_weight: lambda.  Returns [kv_budget] int64.
    """
    window = window_queries.shape[1]
    candidates = keys[: len(keys) - window]
    attended = importance(candidates, window_queries, scaling, kernel_size)
    scores = redundancy_weight * attended - (1 - redundancy_weight) * redundancy(candidates)
    best = descending_order(scores)[: kv_budget - window]
    return with_window(best, len(keys), window)


def importance(keys: Tensor, window_queries: Tensor, scaling: float, kernel_size: int) -> Tensor:
    """Importance I: the maximum logits over the group, softmax over the n candidates, max-pooling
    over `kernel_size` neighbours, mean over the window.

    keys: [n, head_dim].  window_queries: [group, w, head_dim].  Returns [n] float32.
    """
    logits = (window_queries @ keys.T).float().amax(0) * scaling  # [w, n]
    weights = logits.softmax(-1)
    return F.max_pool1d(weights, kernel_size, stride=1, padding=kernel_size // 2).mean(0)


def redundancy(keys: Tensor) -> Tensor:
    """Redundancy R: softmax over the mean cosine similarity of each key to the others.

    The similarity of a key to the latest key similar to it counts as 0 in the mean of that latest
    one, so the last of a set of similar keys is not redundant.
    keys: [n, head_dim].  Returns [n] float32.  Peak memory: [_BLOCK_SIZE, n].
    """
    directions = F.normalize(keys.float(), dim=-1)
    columns = torch.arange(len(keys), device=keys.device)
    total = torch.zeros(len(keys), device=keys.device)
    for start in range(0, len(keys), _BLOCK_SIZE):
        rows = columns[start : start + _BLOCK_SIZE]
        similarity = directions[rows] @ directions.T
        similarity[columns[: len(rows)], rows] = 0
        latest = torch.where(similarity > _SIMILAR, columns, -1).amax(1)  # [block], -1: none
        similarity[columns[: len(rows)], latest] *= latest < 0
        total += similarity.sum(0)
    return (total / len(keys)).softmax(-1)
