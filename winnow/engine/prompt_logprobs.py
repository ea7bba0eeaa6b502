"""Log-probabilities of a prompt's own tokens, a block of positions at a time."""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from winnow.decoder import DecoderModel
from winnow.errors import NotFinite
from winnow.tokens import PromptLogprobs

# Logits held at a time, float32: 64 MiB, however long the prompt and however large the vocabulary.
MAX_LOGITS = 1 << 24


def prompt_logprobs(
    model: DecoderModel,
    hidden: Tensor,
    token_ids: Sequence[int],
    num_top: int,
    max_logits: int = MAX_LOGITS,
) -> Generator[None, None, PromptLogprobs]:
    """Yields after each block, so that whoever drives it may stop; returns them all at the end.

    hidden: [num_tokens, hidden_size], every token's after the last layer, before the final norm.
    num_top: how many likely tokens to list in each place.
    Raises NotFinite for logits that are not finite.
    """
    assert len(hidden) == len(token_ids)
    logprobs: list[float] = []
    top_ids: list[list[int]] = []
    top_logprobs: list[list[float]] = []
    targets = torch.tensor(token_ids[1:], dtype=torch.int64, device=hidden.device)
    block_size = max(1, max_logits // model.vocab_size)
    for start in range(0, len(targets), block_size):
        block = targets[start : start + block_size]
        rows = _log_softmax(model, hidden[start : start + len(block)])
        logprobs += rows.gather(1, block[:, None])[:, 0].tolist()
        top = rows.topk(min(num_top, model.vocab_size))
        top_ids += top.indices.tolist()
        top_logprobs += top.values.tolist()
        yield
    return PromptLogprobs(logprobs, top_ids, top_logprobs)


@torch.inference_mode()
def _log_softmax(model: DecoderModel, hidden: Tensor) -> Tensor:
    """hidden: [T, hidden_size].  Returns [T, vocab_size] float32."""
    logits = model.logits(hidden)
    if not bool(logits.isfinite().all()):
        raise NotFinite("the model's logits of the prompt are not finite")
    return logits.log_softmax(-1)
