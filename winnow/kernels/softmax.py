"""Attention logits with a softcap, and their softmax with sinks."""

import torch
from torch import Tensor


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """The product of softcap and tanh(logits / softcap), in their place; or the logits."""
    if softcap is None:
        return logits
    return logits.div_(softcap).tanh_().mul_(softcap)


def softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """The weights of the keys, of logits [..., keys].

    sinks: [..., 1], or broadcast to it, logits that take part and have no value; None: there are
    none.
    """
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.expand(*logits.shape[:-1], 1)
    return torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]
