"""How far a pruned prompt's answer is the one that the whole prompt would have got."""

import math
from collections.abc import Sequence

from winnow.sampling_params import SamplingParams
from winnow.tokens import PromptLogprobs, TokenLogprobs

# What is left over of 1 is known to float32's precision; q is taken so much larger, to be safe.
_PRECISION = 1e-6


def kl_lower_bound(whole: TokenLogprobs, pruned: TokenLogprobs) -> float:
    """KL(p ‖ q) in nats at least, of next-token distributions of which the top tokens are known.

    p is the whole prompt's, q the pruned one's; A and B are the tokens listed of each. The
    vocabulary is put into buckets: each token of A ∩ B, those of A \\ B together, the rest R.

        Σ_{A∩B} p ln(p/q)  +  p(A\\B) ln(p(A\\B) / x)  +  p(R) ln(p(R) / (1 - q(A∩B) - x))

    Buckets never raise KL. x = q(A\\B) is not listed, but at most m, the lesser of |A\\B| · min_B q
    and 1 - q(B): it is taken where the sum is least, at the lesser of m and
    (1 - q(A∩B)) · p(A\\B) / (p(A\\B) + p(R)). Exact where both lists hold the whole vocabulary.
    """
    p, q = dict(whole.top), dict(pruned.top)
    both = p.keys() & q.keys()
    known = sum(math.exp(p[i]) * (p[i] - q[i]) for i in both)
    p_only = sum(math.exp(p[i]) for i in p.keys() - both)
    p_rest = max(0.0, 1 - sum(map(math.exp, p.values())))
    q_left = max(0.0, 1 - sum(math.exp(q[i]) for i in both))
    q_only = 0.0
    if p_only:
        unlisted = max(0.0, 1 - sum(map(math.exp, q.values())))
        most = min(len(p.keys() - both) * math.exp(min(q.values())), unlisted)
        q_only = min(most, q_left * p_only / (p_only + p_rest))
    return max(0.0, known + _term(p_only, q_only) + _term(p_rest, q_left - q_only))


def _term(p: float, q: float) -> float:
    return p * math.log(p / (q + _PRECISION)) if p > 0 else 0.0


def same_likeliest(one: TokenLogprobs, other: TokenLogprobs) -> bool:
    """Whether both have the same likeliest token."""
    return one.top[0][0] == other.top[0][0]


def count_agreeing(
    answer: Sequence[int],
    logprobs: PromptLogprobs,
    sampling: SamplingParams,
    eos_token_ids: frozenset[int],
) -> int:
    """How many tokens of a greedy answer are those that `logprobs`, of the answer, likes best.

    If all are, greedy decoding from the same beginning gives this very answer; if not, the first
    that is not is where it would go another way. No end token is expected before `min_tokens`.
    """
    ends = sampling.stop_token_ids | eos_token_ids
    expected = (
        next((i for i in top if position >= sampling.min_tokens or i not in ends), None)
        for position, top in enumerate(logprobs.top_ids)
    )
    return sum(one == other for one, other in zip(answer, expected, strict=True))
