"""Attention of a prompt's tokens to some of the keys before them, in blocks of queries."""

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.attention.fused import fused_kernels
from winnow.attention.options import AttentionOptions
from winnow.kernels.cpu.attention import attend, can_attend
from winnow.kernels.cpu.library import has_amx
from winnow.kernels.softmax import softmax
from winnow.visibility import first_keys

# Queries that share a mask. More need more memory, and compute more keys that the mask then hides.
_MASKED_QUERIES = 512
# Logits held at a time where no kernel of PyTorch's computes them: on a CPU what its caches hold,
# elsewhere 128 MiB.
_MAX_LOGITS_ON_CPU = 1 << 20
_MAX_LOGITS = 1 << 25


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own: Tensor,
    options: AttentionOptions,
    *,
    positions: Tensor | None = None,
    first_own: int | None = None,
) -> Tensor:
    """Attention of tokens to the keys that they see up to their own.

    query: [B, H, T, D].  key: [B, H_kv, N, D].  value: [B, H_kv, N, E].  Returns [B, H, T, E].
    own: [T] int64, ascending, the tokens' own keys.  first_own: the first of them, if they are one
    after another; on a device, to know less is to compute more, or to wait.
    positions: [N] of the keys, ascending; None: 0 to N - 1.
    No T x N matrix is held.
    """
    firsts = first_keys(options.layer, own, positions)
    if has_kernel(query, key, value, options):
        return attend(
            query[0],
            key[0],
            value[0],
            own,
            options.scaling,
            first_keys=firsts,
            softcap=options.softcap,
            sinks=options.sinks,
        )[None]
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    num_rows = _rows_at_once(query, key, options)
    for start in range(0, len(own), num_rows):
        rows = slice(start, start + num_rows)
        keys = _keys_of(
            own[rows],
            None if firsts is None else firsts[rows],
            options,
            key.shape[2],
            None if first_own is None else first_own + start,
        )
        every = torch.arange(keys.start, keys.stop, device=query.device)
        is_seen = every <= own[rows, None]  # [rows, keys]
        if firsts is not None:
            is_seen &= every >= firsts[rows, None]
        output[:, :, rows] = _attend(
            query[:, :, rows], key[:, :, keys], value[:, :, keys], is_seen, options
        )
    return output


def has_kernel(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> bool:
    """Whether ours is used. On CPUs with AMX PyTorch's plain attention uses that, and ours not."""
    if len(query) > 1 or not can_attend(query, key, value):
        return False
    return not (options.is_plain and has_amx())


def _rows_at_once(query: Tensor, key: Tensor, options: AttentionOptions) -> int:
    if options.is_plain_softmax:
        return _MASKED_QUERIES
    num_keys = key.shape[2]
    if options.layer.window is not None:
        num_keys = min(num_keys, options.layer.window + _MASKED_QUERIES)
    most = _MAX_LOGITS_ON_CPU if query.device.type == "cpu" else _MAX_LOGITS
    num_rows = most // (query.shape[0] * query.shape[1] * num_keys)
    return min(max(num_rows, 1), _MASKED_QUERIES)


def _keys_of(
    own: Tensor,
    firsts: Tensor | None,
    options: AttentionOptions,
    num_keys: int,
    first_own: int | None,
) -> slice:
    """Keys among which are all that a block of queries sees."""
    if first_own is not None:  # keys lie no further apart than their positions
        window = options.layer.window
        start = 0 if window is None else max(0, first_own + 1 - window)
        return slice(start, first_own + len(own))
    if own.device.type != "cpu":  # reading would wait for all that the device still has to do
        return slice(0, num_keys)
    return slice(0 if firsts is None else int(firsts[0]), int(own[-1]) + 1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, is_seen: Tensor, options: AttentionOptions
) -> Tensor:
    """Of few queries.  is_seen: [T, N]."""
    if not options.is_plain_softmax:
        return _attend_by_formula(query, key, value, is_seen, options)
    num_groups = query.shape[1] // key.shape[1]
    if query.is_cuda and num_groups > 1:  # its fused kernels take no mask with grouped heads
        key, value = (part.repeat_interleave(num_groups, dim=1) for part in (key, value))
    with fused_kernels(query.device):
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=is_seen,
            scale=options.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def _attend_by_formula(
    query: Tensor, key: Tensor, value: Tensor, is_seen: Tensor, options: AttentionOptions
) -> Tensor:
    batch, num_kv_heads, num_keys, head_dim = key.shape
    num_rows = query.shape[2]
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim)  # [B, H_kv, group * T, D]
    products = (grouped @ key.mT).float().view(batch, num_kv_heads, -1, num_rows, num_keys)
    logits = options.logits(products).masked_fill_(~is_seen, -torch.inf)
    weights = softmax(logits, options.grouped_sinks(num_kv_heads)).to(value.dtype)
    return (weights.flatten(2, 3) @ value).view(*query.shape[:3], -1)
