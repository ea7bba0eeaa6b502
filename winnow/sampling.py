"""Sampling: the next token as a pure function of logits, parameters, seed and position.

One uniform number per (seed, position) picks the token by inverse transform. So the result does not
depend on the batch, and a sequence that migrates to another worker continues unchanged.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnow.errors import NotFinite
from winnow.sampling_params import SamplingParams
from winnow.tokens import TokenLogprobs

_MASK64 = (1 << 64) - 1


@dataclass(slots=True)
class TokenHistory:
    """The tokens that penalties depend on."""

    prompt: tuple[int, ...] = ()
    generated: list[int] = field(default_factory=list)


def uniform(seed: int, position: int) -> float:
    """A pseudorandom number in [0, 1), a pure function of its arguments.

    Two rounds of SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014).
    """
    return (_mix64(_mix64(seed) ^ position) >> 11) / (1 << 53)


def _mix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def sample(
    logits: Tensor,
    params: SamplingParams,
    position: int,
    history: TokenHistory,
    *,
    seed: int,
    end_token_ids: Collection[int] = (),
) -> int:
    """Sample the token at `position`.

    logits: [vocab_size] float32; not changed.
    end_token_ids: not sampled before `params.min_tokens` tokens have been generated.
    Raises NotFinite if a logit is not finite.
    """
    if not bool(logits.isfinite().all()):
        raise NotFinite(f"the model's logits at position {position} are not finite")
    logits = _adjust(logits.to(torch.float64, copy=True), params, history)
    if len(history.generated) < params.min_tokens:
        logits[list(end_token_ids)] = torch.finfo(logits.dtype).min
    if params.temperature == 0:
        return int(logits.argmax())
    below_best = logits - logits.max()  # so that dividing by a tiny temperature cannot overflow
    probabilities = _filter((below_best / params.temperature).softmax(-1), params)
    cumulative = probabilities.cumsum(-1)
    target = cumulative[-1] * uniform(seed, position)
    return int(torch.searchsorted(cumulative, target, right=True).clamp_max(len(logits) - 1))


def _adjust(logits: Tensor, params: SamplingParams, history: TokenHistory) -> Tensor:
    """Apply penalties, then biases, like vLLM and OpenAI.  logits: float64, changed in place."""
    if params.repetition_penalty != 1:
        seen = torch.tensor(
            [*{*history.prompt, *history.generated}], dtype=torch.int64, device=logits.device
        )
        values = logits[seen]
        penalty = params.repetition_penalty
        scaled = torch.where(values > 0, values / penalty, values * penalty)
        logits[seen] = scaled.clamp_max(torch.finfo(scaled.dtype).max)  # penalty near zero
    if history.generated and (params.presence_penalty or params.frequency_penalty):
        generated = torch.tensor(history.generated, device=logits.device)
        tokens, counts = torch.unique(generated, return_counts=True)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts.double()
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += bias
    return logits


def _filter(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """Zero what min-p, top-k, and top-p (after top-k) exclude.  [vocab_size] float64."""
    if params.min_p > 0:
        least = probabilities.max() * params.min_p
        probabilities = probabilities.where(probabilities >= least, 0)
    if params.top_k == 0 and params.top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(descending=True, stable=True)
    if params.top_k:
        ordered[params.top_k :] = 0
    if params.top_p < 1:
        mass_before = ordered.cumsum(-1) - ordered
        ordered[mass_before >= params.top_p * ordered.sum()] = 0
    return torch.zeros_like(probabilities).scatter_(0, order, ordered)


def token_logprobs(logits: Tensor, token_id: int, num_logprobs: int) -> TokenLogprobs:
    """Log-probabilities, under raw logits [vocab_size], of the token and of the likeliest ones."""
    logprobs = logits.log_softmax(-1)
    values, indices = logprobs.topk(min(num_logprobs, len(logprobs)))
    top: Sequence[tuple[int, float]] = list(zip(indices.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(logprob=float(logprobs[token_id]), top=tuple(top))
