"""Log-probabilities of a prompt's own tokens, computed in blocks of positions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.decoder import DecoderModel
from winnow.errors import NotFinite
from winnow.tokens import PromptLogprobs

# Logits held at a time, float32: 64 MiB for any prompt length and vocabulary size.
MAX_LOGITS = 1 << 24


def scoring_layer_tokens(model: DecoderModel, num_tokens: int) -> int:
    """About as many layer-tokens as computing the logits of `num_tokens` costs.

    A layer has about 12 hidden_size² weights, the LM head has hidden_size · vocab_size.
    """
    return num_tokens * max(1, model.vocab_size // (12 * model.shape.hidden_size))


class PromptLogprobsRun:
    """The log-probabilities of one prompt, computed block by block.

    hidden: [num_tokens, hidden_size], of every token after the last layer, before the final norm.
    num_top: number of likeliest tokens to list for each position.
    """

    def __init__(
        self,
        model: DecoderModel,
        hidden: Tensor,
        token_ids: Sequence[int],
        num_top: int,
        max_logits: int = MAX_LOGITS,
    ) -> None:
        assert len(hidden) == len(token_ids)
        self._model = model
        self._hidden = hidden
        self._targets = torch.tensor(token_ids[1:], dtype=torch.int64, device=hidden.device)
        self._num_top = min(num_top, model.vocab_size)
        self._block_size = max(1, max_logits // model.vocab_size)
        self._done = PromptLogprobs([], [], [])

    @property
    def finished(self) -> bool:
        """Whether every token has its log-probability."""
        return self.num_tokens_left == 0

    @property
    def num_tokens_left(self) -> int:
        """Tokens without log-probability."""
        return len(self._targets) - len(self._done.logprobs)

    def compute_block(self) -> None:
        """Compute the next block; raises NotFinite for logits that are not finite."""
        start = len(self._done.logprobs)
        block = self._targets[start : start + self._block_size]
        rows = self._log_softmax(self._hidden[start : start + len(block)])
        self._done.logprobs.extend(rows.gather(1, block[:, None])[:, 0].tolist())
        top = rows.topk(self._num_top)
        self._done.top_ids.extend(top.indices.tolist())
        self._done.top_logprobs.extend(top.values.tolist())

    def result(self) -> PromptLogprobs:
        """The log-probabilities of a finished run."""
        return self._done

    @torch.inference_mode()
    def _log_softmax(self, hidden: Tensor) -> Tensor:
        """hidden: [T, hidden_size].  Returns [T, vocab_size] float32."""
        logits = self._model.logits(hidden)
        if not bool(logits.isfinite().all()):
            raise NotFinite("the model's logits of the prompt are not finite")
        return logits.log_softmax(-1)
