"""KV compression rules: which KV entries of a layer are kept. One file per rule.

To add a rule: write its file (a subclass of CompressionRule or RecompressionRule in base.py), and
add its line to winnow/catalog.py; docs/methods.md has the recipe.
"""

from winnow.catalog import COMPRESSIONS, RECOMPRESSIONS, load
from winnow.compression.base import CompressionRule, RecompressionRule
from winnow.pruning_settings import PruningSettings, Recompression

__all__ = ["CompressionRule", "RecompressionRule", "compression_rule", "recompression_rule"]


def compression_rule(settings: PruningSettings) -> CompressionRule:
    """The rule that `settings.compression` names."""
    rule: CompressionRule = load(COMPRESSIONS[settings.compression])(settings)
    return rule


def recompression_rule(settings: Recompression) -> RecompressionRule:
    """The rule that `settings.method` names."""
    rule: RecompressionRule = load(RECOMPRESSIONS[settings.method])(settings)
    return rule
