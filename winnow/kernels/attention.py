"""Decode attention over pages: appends each row's new entry, then attends to all of the row's."""

import torch
from torch import Tensor


def append_and_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scaling: float,
) -> Tensor:
    """Attention of one new token per row to its paged entries, the new one included.

    query: [B, H, D].  new_keys, new_values: [B, H_kv, D], written to `slots` [B, H_kv].
    keys, values: [num_pages, page_size, D].  pages: [B, H_kv, P] pages of each head.
    lengths: [B, H_kv] entries of each head, the new one included; 0: the head has none, nothing is
    written and its output is zeros.  Returns [B, H, D].
    """
    num_rows, num_heads, head_dim = query.shape
    is_used = lengths > 0
    keys.view(-1, head_dim)[slots[is_used]] = new_keys[is_used]
    values.view(-1, head_dim)[slots[is_used]] = new_values[is_used]
    own_keys, own_values = (part[pages].flatten(2, 3).float() for part in (keys, values))
    grouped = query.float().reshape(num_rows, lengths.shape[1], -1, head_dim)
    logits = grouped @ own_keys.mT * scaling  # [B, H_kv, group, T]
    is_entry = torch.arange(logits.shape[-1], device=query.device) < lengths[..., None]
    weights = logits.masked_fill(~is_entry[:, :, None], -torch.inf).softmax(-1)
    # Where a page has no entry yet there may be anything, NaN included.
    output = weights.nan_to_num() @ own_values.masked_fill(~is_entry[..., None], 0)
    return output.reshape(num_rows, num_heads, head_dim).to(query.dtype)
