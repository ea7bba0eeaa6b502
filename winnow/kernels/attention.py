"""Decode attention over pages: appends each row's new entry, then attends to all of the row's."""

import torch
from torch import Tensor

from winnow.kernels.variant import PLAIN, Variant
from winnow.kv_quantization import dequantize, quantize


def append_and_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    pages: Tensor,
    rows: Tensor,
    lengths: Tensor,
    most: int,
    scaling: float,
    scales: Tensor | None = None,
    variant: Variant = PLAIN,
) -> Tensor:
    """Attention of one new token per row to its paged entries, the new one included.

    query: [B, H, D].  new_keys, new_values: [B, H_kv, D], written to `slots` [B, H_kv].
    keys, values: [num_pages, page_size, D].
    pages: [num_rows, H_kv, P] of each head in the page table, and `rows` [B] of the batch there.
    lengths: [B, H_kv] entries of each head, the new one included; 0: the head has none, nothing is
    written and its output is zeros.  most: no head has more.  Returns [B, H, D].
    scales: [num_pages, page_size, 2] float16, of keys and of values that are int8; the new ones are
    quantized as they are written, and attended to as they are then.
    """
    num_rows, num_heads, head_dim = query.shape
    pages = pages[rows, :, : -(-most // keys.shape[1])]
    is_used = lengths > 0
    own = []  # keys and values, each [B, H_kv, T, D]
    for idx, (part, new) in enumerate(((keys, new_keys), (values, new_values))):
        target = slots[is_used]
        if scales is None:
            part.view(-1, head_dim)[target] = new[is_used]
            own.append(part[pages].flatten(2, 3).float())
        else:
            levels, scale = quantize(new[is_used])
            part.view(-1, head_dim)[target], scales.view(-1, 2)[target, idx] = levels, scale
            held = dequantize(part[pages], scales[pages][..., idx], torch.float32)
            own.append(held.flatten(2, 3))
    own_keys, own_values = own
    grouped = query.float().reshape(num_rows, lengths.shape[1], -1, head_dim)
    logits = grouped @ own_keys.mT * scaling  # [B, H_kv, group, T]
    is_entry = torch.arange(logits.shape[-1], device=query.device) < lengths[..., None]
    if variant.first is not None:
        assert variant.positions is not None
        is_entry &= variant.positions[pages].flatten(2) >= variant.first[:, None, None]
    weights = variant.weights(logits, ~is_entry[:, :, None])
    # Where a page has no entry yet there may be anything, NaN included.
    output = weights @ own_values.masked_fill(~is_entry[..., None], 0)
    return output.reshape(num_rows, num_heads, head_dim).to(query.dtype)
