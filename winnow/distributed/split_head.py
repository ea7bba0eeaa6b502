"""Rank 0's model where logits are wanted outside of steps, as those of a prompt's last token."""

import torch
from torch import Tensor

from winnow.decoder import DecoderModel
from winnow.distributed.commands import Logits
from winnow.distributed.exchange import share
from winnow.distributed.in_step import StepModel
from winnow.distributed.ranks import Ranks


class SplitHead(StepModel):
    """Its logits are computed by all ranks.  own: rank 0's share of the model."""

    def __init__(self, own: DecoderModel, ranks: Ranks) -> None:
        super().__init__(own)
        self._ranks = ranks

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        with self._ranks.in_step():
            self._ranks.tell(Logits(len(hidden)))
            share(hidden)
            return super().logits(hidden)
