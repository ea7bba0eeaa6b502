"""R-KV (arXiv 2505.24133): keeps entries that are attended to and not redundant."""

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.compression.base import RecompressionRule
from winnow.compression.heads import PagedHeads
from winnow.kernels.recompression import padded_keys
from winnow.kernels.softmax import capped

_SIMILAR = 0.5  # T in the authors' code; the paper gives neither it nor beta, which is 1 there


class RKVRecompression(RecompressionRule):
    """Trades attention against redundancy by `redundancy_weight`: lambda I - (1 - lambda) R."""

    def scores(self, heads: PagedHeads) -> Tensor:
        how = (self.settings.kernel_size, self.settings.redundancy_weight)
        if heads.softcap is None:
            return heads.kernels.rkv_scores(*heads.operands, *how)
        return rkv_scores(*heads.operands, *how, heads.softcap)  # no kernel has softcaps


def rkv_scores(
    queries: Tensor,
    keys: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scaling: float,
    scales: Tensor | None,
    kernel_size: int,
    redundancy_weight: float,
    softcap: float | None = None,
) -> Tensor:
    """The score of each entry before the window: [N, T] float32.

    The tensors and the softcap are those of `winnow.kernels.recompression.window_scores`. Sinks
    have no part: the softmax is over the entries that can be dropped, of all of a group's heads.
    """
    own = padded_keys(keys, pages, scales, queries.dtype)
    group, window = queries.shape[1:3]
    entry = torch.arange(own.shape[1], device=own.device)
    is_candidate = entry < (lengths - window)[:, None]
    attended = importance(own, is_candidate, queries, scaling, kernel_size, softcap)
    redundant = redundancy(own, is_candidate, group * window)  # takes `importance`'s memory
    return redundancy_weight * attended - (1 - redundancy_weight) * redundant


def importance(
    keys: Tensor,
    is_candidate: Tensor,
    queries: Tensor,
    scaling: float,
    kernel_size: int,
    softcap: float | None = None,
) -> Tensor:
    """Importance I: the maximum logits over the group, softmax over the candidates, max-pooling
    over `kernel_size` neighbours, mean over the window.

    keys: [N, T, D].  is_candidate: [N, T].  queries: [N, group, w, D].  Returns [N, T] float32.
    """
    grouped = queries.flatten(1, 2)  # [N, group * w, D]
    logits = (grouped @ keys.mT).view(*queries.shape[:3], -1).amax(1).float() * scaling
    logits = capped(logits, softcap)  # grows with the logit, so the maximum stays the same one
    weights = logits.masked_fill_(~is_candidate[:, None], -torch.inf).softmax(-1)  # [N, w, T]
    return F.max_pool1d(weights, kernel_size, stride=1, padding=kernel_size // 2).mean(1)


def redundancy(keys: Tensor, is_candidate: Tensor, block_size: int) -> Tensor:
    """Redundancy R: softmax over the mean cosine similarity of each candidate to the others.

    The similarity of a key to the latest key similar to it counts as 0 in the mean of that latest
    one, so the last of a set of similar keys is not redundant.
    keys: [N, T, D].  is_candidate: [N, T].  Returns [N, T] float32, 0 where no candidate is.
    Peak memory: [N, block_size, T].
    """
    # A direction of 0 is similar to nothing; so is a key that is not finite.
    own = keys.float().masked_fill_(~is_candidate[..., None], 0)
    directions = F.normalize(own, dim=-1).nan_to_num_(0)
    numbers = torch.arange(1.0, keys.shape[1] + 1, device=keys.device)
    total = torch.zeros(keys.shape[:2], device=keys.device)
    for start in range(0, keys.shape[1], block_size):
        rows = slice(start, start + block_size)
        similarity = directions[:, rows] @ directions.mT  # [N, block, T]
        similarity.diagonal(start, 1, 2).zero_()
        # The number of the latest similar one, or none above 0: arithmetic is fast on a CPU.
        latest = (similarity - _SIMILAR).sign_().mul_(numbers).amax(-1, keepdim=True)
        own = (latest - 1).clamp_min_(0).long()  # [N, block, 1]
        similarity.scatter_(-1, own, similarity.gather(-1, own) * (latest <= 0))
        total += similarity.sum(1)
    mean = total / is_candidate.sum(-1, keepdim=True)
    return mean.masked_fill_(~is_candidate, -torch.inf).softmax(-1)
