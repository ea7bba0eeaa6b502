"""What the kernels compute, in float64 and head by head."""

import torch
from torch import Tensor


def softmax_sum(weights: Tensor, values: Tensor) -> Tensor:
    return weights.double().softmax(-1) @ values.double()


def attention(
    query: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor, scaling: float
) -> Tensor:
    """query: [B, H, D].  keys, values: [num_pages, page_size, D], the new entries included.

    pages: [B, H_kv, P].  lengths: [B, H_kv].  Returns [B, H, D].
    """
    group = query.shape[1] // pages.shape[1]
    rows = []
    for row, own_lengths in enumerate(lengths.tolist()):
        for head, length in enumerate(own_lengths):
            own = query[row, head * group : (head + 1) * group].double()  # [group, D]
            own_keys, own_values = (
                part[pages[row, head]].flatten(0, 1)[:length].double() for part in (keys, values)
            )
            rows.append(softmax_sum(own @ own_keys.T * scaling, own_values))
    return torch.cat(rows).view(query.shape)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    exact = hidden.double()
    return weight.double() * exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt()


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads: [B, n, D].  cos, sin: [B, D]."""
    first, second = heads.double().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return heads.double() * cos[:, None].double() + turned * sin[:, None].double()


def window_scores(
    queries: Tensor, keys: Tensor, pages: Tensor, lengths: Tensor, scaling: float
) -> Tensor:
    """As `winnow.kernels.recompression.window_scores`."""
    window = queries.shape[2]
    scores = torch.zeros(
        len(pages), pages.shape[1] * keys.shape[1], dtype=torch.float64, device=keys.device
    )
    for head, length in enumerate(lengths.tolist()):
        own = keys[pages[head]].flatten(0, 1)[:length].double()
        logits = queries[head].double() @ own.T * scaling  # [group, w, T]
        hidden = torch.ones(window, length, dtype=torch.bool, device=keys.device)
        logits = logits.masked_fill(hidden.triu(length - window + 1), -torch.inf)
        scores[head, :length] = logits.softmax(-1).sum((0, 1))
    return scores
