"""The factors that families put before their first layer and behind their head."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NetworkScales:
    """embedding: factor of what goes into the first layer.

    logits, logits_divisor: of what comes out of the head.
    softcap: c of c * tanh(logits / c), which is taken last.
    """

    embedding: float = 1.0
    logits: float = 1.0
    logits_divisor: float = 1.0
    softcap: float | None = None

    def embedded(self, embeddings: Tensor) -> Tensor:
        """What goes into the first layer.  embeddings: [..., hidden_size]."""
        return embeddings if self.embedding == 1.0 else embeddings * self.embedding

    def scaled(self, logits: Tensor) -> Tensor:
        """The logits of what comes out of the head, [..., vocab_size]."""
        if self.logits != 1.0:
            logits = logits * self.logits
        if self.logits_divisor != 1.0:
            logits = logits / self.logits_divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def scales_of(config: Any) -> NetworkScales:  # noqa: ANN401 - each family has its own class
    """Those of a configuration of transformers', by the names that its family gives them."""
    embedding = _number(config, "embedding_multiplier", 1.0)
    if getattr(config, "mup_enabled", False):
        embedding = config.hidden_size**0.5
    divisor = _number(config, "logits_scaling", 1.0)
    logits = _number(config, "logit_scale", _number(config, "lm_head_multiplier", 1.0))
    if config.model_type in _MULTIPLY_BY_LOGITS_SCALING:
        logits, divisor = divisor, 1.0
    softcap = _number(config, "final_logit_softcapping", 0.0) or None
    return NetworkScales(embedding, logits, divisor, softcap)


_MULTIPLY_BY_LOGITS_SCALING = frozenset({"hyperclovax"})  # where others divide by it


def _number(config: Any, name: str, otherwise: float) -> float:  # noqa: ANN401
    value = getattr(config, name, None)
    return otherwise if value is None else float(value)
