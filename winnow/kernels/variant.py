"""How a layer's attention over pages differs from the plain kind."""

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.kernels.softmax import capped, softmax


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """What is more than a softmax of scaled products with all of a head's entries.

    first: [B] int64, the first position that each row attends to; None: each attends to all
    entries.  positions: [num_pages, page_size] int32, of the entries, ascending within a head; only
    with `first`.
    softcap: s becomes softcap * tanh(s / softcap); None: it does not.
    sinks: [H], a logit of each head that takes part in the softmax and has no value.
    """

    first: Tensor | None = None
    positions: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def weights(self, logits: Tensor, is_hidden: Tensor) -> Tensor:
        """The softmax over entries, zeros where all of them are hidden.

        logits: [B, H_kv, group, T] float32, not needed any more.
        is_hidden: of the same shape, or broadcast to it.
        """
        logits = capped(logits, self.softcap).masked_fill_(is_hidden, -torch.inf)
        sinks = self.sinks
        if sinks is not None:
            sinks = sinks.float().view(*logits.shape[1:3], 1)
        return softmax(logits, sinks).masked_fill_(is_hidden, 0)  # NaN where all are


PLAIN = Variant()
