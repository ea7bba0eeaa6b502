"""Answers that follow a grammar, token by token at random, as a model without any sense gives."""

import random
from collections.abc import Sequence

import numpy as np

from tests.models_in_code import VOCAB_SIZE
from winnow.grammar.constraint import CompiledGrammar, Constraint

END = 0  # the end token of the models in code


def allowed(
    constraint: Constraint, tokens: Sequence[int] = (), *, may_end: bool = True
) -> set[int]:
    """The ids that may come after these tokens."""
    bits = np.empty(VOCAB_SIZE // 32, np.int32)
    constraint.advance(tokens)
    constraint.fill(bits, may_end=may_end)
    flags = np.unpackbits(bits.view(np.uint8), bitorder="little")
    return {int(idx) for idx in np.flatnonzero(flags)}


def walk(grammar: CompiledGrammar, seed: int, max_tokens: int = 400) -> list[int]:
    """The tokens of an answer, the end token included unless it is too long."""
    draw, constraint = random.Random(seed), grammar.constraint()
    tokens: list[int] = []
    while len(tokens) < max_tokens and END not in tokens:
        tokens.append(draw.choice(sorted(allowed(constraint, tokens))))
        assert constraint.failure is None
    return tokens
