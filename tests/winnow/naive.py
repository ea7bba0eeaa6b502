"""The formulas of ASL and SnapKV, written out as loops over plain numbers.

Slow and obvious on purpose: what the library computes must equal this. Scores are lists of floats,
one row per head; the caller chooses inputs for which float arithmetic is exact.
"""

import math

import torch
from torch import Tensor

# Multiples of 105 = 3 * 5 * 7 make every pooled score a whole number: no rounding, many ties.
UNIT = 105


def observed_attention(queries: Tensor, keys: Tensor) -> list[list[float]]:
    """U over all N columns: softmax of q·k/sqrt(d), causal, summed over the window's rows."""
    num_heads, window, head_dim = queries.shape
    num_kv_heads, num_tokens, _ = keys.shape
    group = num_heads // num_kv_heads
    mass = [[0.0] * num_tokens for _ in range(num_heads)]
    for head in range(num_heads):
        for row in range(window):
            visible = num_tokens - window + row + 1
            logits = [
                float(queries[head, row].double() @ keys[head // group, col].double())
                / math.sqrt(head_dim)
                for col in range(visible)
            ]
            largest = max(logits)
            weights = [math.exp(value - largest) for value in logits]
            for col, weight in enumerate(weights):
                mass[head][col] += weight / sum(weights)
    return mass


def pool(row: list[float], kernel_size: int) -> list[float]:
    """Average over kernel_size neighbours; beyond the ends stand zeros that count."""
    half = kernel_size // 2
    padded = [0.0] * half + row + [0.0] * half
    return [sum(padded[i : i + kernel_size]) / kernel_size for i in range(len(row))]


def pooled(mass: list[list[float]], window: int, kernel_size: int) -> list[list[float]]:
    return [pool(row[: len(row) - window], kernel_size) for row in mass]


def by_score(scores: list[float]) -> list[int]:
    """Token indices, best first, ties to the earlier token."""
    return sorted(range(len(scores)), key=lambda token: (-scores[token], token))


def snapkv(
    mass: list[list[float]], num_kv_heads: int, window: int, kernel_size: int, budget: int
) -> list[list[int]]:
    """Per KV head, the kept entries."""
    rows, num_tokens = pooled(mass, window, kernel_size), len(mass[0])
    group = len(mass) // num_kv_heads
    kept = []
    for head in range(num_kv_heads):
        members = rows[head * group : (head + 1) * group]
        scores = [sum(column) for column in zip(*members, strict=True)]
        best = by_score(scores)[: budget - window]
        kept.append(sorted(best) + list(range(num_tokens - window, num_tokens)))
    return kept


def top_p(mass: list[list[float]], num_kv_heads: int, window: int, p: float) -> list[list[int]]:
    """Per KV head, the smallest set whose share reaches p, token 0 and the window."""
    num_tokens, group = len(mass[0]), len(mass) // num_kv_heads
    kept = []
    for head in range(num_kv_heads):
        members = mass[head * group : (head + 1) * group]
        share = [sum(column) / (group * window) for column in zip(*members, strict=True)]
        chosen, reached = {0, *range(num_tokens - window, num_tokens)}, 0.0
        for token in by_score(share):
            if reached >= p:
                break
            chosen.add(token)
            reached += share[token]
        kept.append(sorted(chosen))
    return kept


def gemfilter(raw: list[list[float]], select_tokens: int) -> list[int]:
    """The tokens that are prefilled again.  raw: q·k of the last query, one row per head."""
    scores = pool([sum(column) for column in zip(*raw, strict=True)], 5)
    best, last = by_score(scores)[:select_tokens], len(scores) - 1
    if last not in best:
        best[-1] = last
    return sorted(best)


class Asl:
    """selection_layer, kept tokens and rho for one prompt's observed attention, layer by layer."""

    def __init__(
        self,
        masses: list[list[list[float]]],
        *,
        window: int,
        kernel_size: int,
        select_tokens: int,
        observed_layers: int,
        min_layer: int,
        threshold: float,
        latest_layer: int | None = None,
    ) -> None:
        self.selection_layer: int | None = None
        self.kept: list[int] | None = None
        self.rho: list[tuple[int, float]] = []
        num_tokens = len(masses[0][0])
        n = num_tokens - window
        k = min(select_tokens - window, n)
        orders = []
        for mass in masses:
            rows = pooled(mass, window, kernel_size)
            orders.append(by_score([sum(column) for column in zip(*rows, strict=True)]))
        first = None
        for layer in range(min_layer, len(masses)):
            recent = orders[layer - observed_layers + 1 : layer + 1]
            ranks = [{token: rank for rank, token in enumerate(order, 1)} for order in recent]
            union = set().union(*(order[:k] for order in recent))
            squares = []
            for token in union:
                mean = sum(rank[token] for rank in ranks) / len(ranks)
                squares += [(rank[token] - mean) ** 2 for rank in ranks]
            variance = sum(squares) / len(squares)
            if first is None:
                first, rho = variance, 1.0
            else:
                rho = variance / (first or 1e-15)
            self.rho.append((layer, rho))
            if rho < threshold or layer == latest_layer:
                self.selection_layer = layer
                best = sorted(orders[layer][:k])
                self.kept = best + list(range(n, num_tokens))
                return


def as_lists(mass: Tensor) -> list[list[float]]:
    return mass.to(torch.float64).tolist()
