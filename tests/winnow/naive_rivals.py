"""The formulas of ASL's rivals, written out as loops over plain numbers (see naive.py)."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from tests.winnow.naive import by_score, pooled


def accumulated_attention(queries: Tensor, keys: Tensor) -> list[list[float]]:
    """The columns' sums of the causal attention matrix.  queries: [num_heads, N, head_dim]."""
    num_heads, num_tokens, head_dim = queries.shape
    group = num_heads // len(keys)
    mass = [[0.0] * num_tokens for _ in range(num_heads)]
    for head in range(num_heads):
        for row in range(num_tokens):
            weights = [
                math.exp(dot(queries[head, row], keys[head // group, col]) / math.sqrt(head_dim))
                for col in range(row + 1)
            ]
            for col, weight in enumerate(weights):
                mass[head][col] += weight / sum(weights)
    return mass


def dot(one: Tensor, other: Tensor) -> float:
    return float(one.double() @ other.double())


def grouped(rows: list[list[float]], num_kv_heads: int) -> list[list[float]]:
    """Rows of query heads summed per KV head."""
    group = len(rows) // num_kv_heads
    return [
        [sum(column) for column in zip(*rows[head * group : (head + 1) * group], strict=True)]
        for head in range(num_kv_heads)
    ]


def adakv(
    mass: list[list[float]], num_kv_heads: int, window: int, kernel_size: int, budget: int
) -> list[list[int]]:
    """Per KV head, the kept entries: budgets by the layer's best, 1 / 5 of each guaranteed."""
    scores, num_tokens = grouped(pooled(mass, window, kernel_size), num_kv_heads), len(mass[0])
    each = budget - window
    everyone = [
        (-score, head, token) for head, row in enumerate(scores) for token, score in enumerate(row)
    ]
    best = sorted(everyone)[: num_kv_heads * each]
    counts = [sum(owner == head for _, owner, _ in best) for head in range(num_kv_heads)]
    alpha = Fraction(1, 5)
    shares = [(1 - alpha) * count + alpha * each for count in counts]
    budgets = [math.floor(share) for share in shares]
    by_loss = sorted(range(num_kv_heads), key=lambda head: (budgets[head] - shares[head], head))
    for head in by_loss[: num_kv_heads * each - sum(budgets)]:
        budgets[head] += 1
    recent = list(range(num_tokens - window, num_tokens))
    return [sorted(by_score(row)[:own]) + recent for row, own in zip(scores, budgets, strict=True)]


def h2o(
    mass: list[list[float]], num_kv_heads: int, num_recent: int, budget: int
) -> list[list[int]]:
    """Per KV head, the heavy hitters and the recent entries."""
    num_tokens = len(mass[0])
    recent = list(range(num_tokens - num_recent, num_tokens))
    return [
        sorted(by_score(row[: num_tokens - num_recent])[: budget - num_recent]) + recent
        for row in grouped(mass, num_kv_heads)
    ]


def pyramid_scores(queries: Tensor, keys: Tensor) -> list[float]:
    """The window's attention, weights 1 to 1.2 over its rows, averaged over heads."""
    num_heads, window, head_dim = queries.shape
    num_kv_heads, num_tokens, _ = keys.shape
    scores = [0.0] * num_tokens
    for head in range(num_heads):
        for row in range(window):
            key_head = keys[head // (num_heads // num_kv_heads)]
            weights = [
                math.exp(dot(queries[head, row], key_head[col]) / math.sqrt(head_dim))
                for col in range(num_tokens - window + row + 1)
            ]
            later = 1 + 0.2 * row / (window - 1) if window > 1 else 1
            for col, weight in enumerate(weights):
                scores[col] += later * weight / sum(weights) / num_heads
    return scores


def rkv_importance(queries: Tensor, keys: Tensor, kernel_size: int) -> list[float]:
    """I of R-KV, equations 2 to 4.  queries: [group, w, head_dim]; keys: [n, head_dim]."""
    group, window, head_dim = queries.shape
    n, half = len(keys), kernel_size // 2
    total = [0.0] * n
    for row in range(window):
        logits = [
            max(dot(queries[g, row], keys[col]) / math.sqrt(head_dim) for g in range(group))
            for col in range(n)
        ]
        exps = [math.exp(logit) for logit in logits]
        weights = [value / sum(exps) for value in exps]
        for col in range(n):
            total[col] += max(weights[max(0, col - half) : col + half + 1]) / window
    return total


def rkv_redundancy(keys: Tensor, threshold: float = 0.5) -> list[float]:
    """R of R-KV, equations 5 and 6 with beta = 1."""
    n = len(keys)
    similarity = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            if i != j:
                lengths = float(keys[i].double().norm()) * float(keys[j].double().norm())
                similarity[j, i] = dot(keys[i], keys[j]) / lengths if lengths else 0.0
    for i in range(n):
        alike = [j for j in range(n) if similarity[j, i] > threshold]
        if alike:
            similarity[alike[-1], i] = 0
    exps = [math.exp(sum(float(similarity[j, i]) for i in range(n)) / n) for j in range(n)]
    return [value / sum(exps) for value in exps]
