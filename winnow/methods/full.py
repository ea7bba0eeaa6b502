"""The method without pruning."""

from winnow.methods.base import Method


class Full(Method):
    """Every layer computes every token and keeps its KV."""

    prunes = False
