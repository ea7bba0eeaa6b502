"""What all ranks compute together in a decode step, besides their layers, and what they agree on.

Nothing here waits for a device but `agree`: a whole step can be recorded, on all ranks alike.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from winnow.decoder import DecoderModel
from winnow.engine.graph import Recorder
from winnow.engine.kv_pool import KVPool
from winnow.engine.step_runner import StepRunner


class StepModel(DecoderModel):
    """A rank's share of the model in steps: rank 0 alone knows the tokens, and gets the logits."""

    def __init__(self, own: DecoderModel, rank: int = 0) -> None:
        super().__init__(own._model, own.description, own.device, own.shape)
        self.adapters = own.adapters
        self._is_first = rank == 0

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """The embeddings of rank 0's tokens [B, T], on every rank."""
        if self._is_first:
            hidden = super().embed(token_ids).contiguous()
        else:
            size = (*token_ids.shape, self.shape.hidden_size)
            hidden = torch.empty(size, dtype=self.shape.dtype, device=self.device)
        dist.broadcast(hidden, src=0)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See DecoderModel; on other ranks those of their own part of the vocabulary."""
        own = self._model.head_outputs(hidden)
        if not self._is_first:
            dist.gather(own, dst=0)
            return own.float()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.gather(own, parts, dst=0)
        outputs = torch.cat(parts, dim=1)[:, : self.vocab_size]
        return self._model.scales.scaled(outputs).float().contiguous()


def shared_steps(
    model: StepModel, pool: KVPool, max_batch_size: int, new_recorder: Callable[[], Recorder] | None
) -> StepRunner:
    """Runs steps whose logits rank 0 gets; every rank makes its own at the same time."""
    return StepRunner(model, pool, max_batch_size, new_recorder, agree, gives_logits=True)


def agree(reason: str | None) -> str | None:
    """Why the first rank that has a reason cannot go on; every rank calls it, and does alike.

    It does not go by NCCL, which a capture that failed may have broken.
    """
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next((f"rank {rank}: {one}" for rank, one in enumerate(reasons) if one), None)
