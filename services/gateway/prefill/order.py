"""Which prefill replica a prompt goes to: the decision alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Costs that differ by less than this share of the prompt are equal. A short beginning that all
# prompts share, as a system prompt, therefore does not draw them all to one replica.
_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Load:
    """One replica, as far as a prompt is concerned.

    held_tokens: of the prompt, from its first token on, those that need not be computed.
    work: tokens still to be computed of each other prompt there.
    """

    held_tokens: int
    work: Sequence[int]

    def cost(self, num_tokens: int) -> int:
        """Tokens computed while prompts wait, if a prompt of `num_tokens` comes here.

        The prompt waits for its own tokens. Where the shortest goes first, each other prompt is
        waited for if it is shorter, and waits for this one if it is longer.
        """
        to_compute = max(1, num_tokens - self.held_tokens)
        return to_compute + sum(min(tokens, to_compute) for tokens in self.work)


def best_first(num_tokens: int, loads: Sequence[Load]) -> list[int]:
    """Indices of `loads` in order of cost; of those that equal the best, the least work is first.

    Ties are broken at random.
    """
    costs = [load.cost(num_tokens) for load in loads]
    equal_to_best = min(costs, default=0) + _TOLERANCE * num_tokens

    def rank(idx: int) -> tuple[int, int, float]:
        cost = costs[idx] if costs[idx] > equal_to_best else 0
        return cost, sum(loads[idx].work), random.random()

    return sorted(range(len(loads)), key=rank)
