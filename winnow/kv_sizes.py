"""How large each layer's keys and values are, by a configuration of transformers'."""

from collections.abc import Iterator, Sequence
from typing import Any

from winnow.context_length import positive_int
from winnow.kv import KVSize
from winnow.layers import Layer

# Times as many KV heads in sliding layers, where the network alone says so.
_MORE_IN_SLIDING = {"mimo_v2_flash": 2}


def sizes_of(config: Any, num_layers: int) -> tuple[KVSize, ...]:  # noqa: ANN401
    """Each layer's; raises ValueError if they are invalid."""
    return tuple(_sizes(config, num_layers))


def _sizes(config: Any, num_layers: int) -> Iterator[KVSize]:  # noqa: ANN401
    own = config.per_layer_config if config.is_heterogeneous else [config] * num_layers
    kinds = getattr(config, "layer_types", None) or [None] * num_layers
    num_heads = positive_int(config, "num_attention_heads")
    for one, kind in zip(own, kinds, strict=True):
        if one.num_attention_heads != num_heads:
            raise ValueError(
                f"num_attention_heads is {num_heads}, {one.num_attention_heads}, depending on the "
                "layer"
            )
        num_kv_heads = getattr(one, "num_key_value_heads", None) or num_heads
        if kind == "sliding_attention":
            num_kv_heads *= _MORE_IN_SLIDING.get(config.model_type, 1)
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} attention heads cannot share {num_kv_heads} KV heads")
        key_dim = getattr(one, "head_dim", None) or config.hidden_size // num_heads
        yield KVSize(num_kv_heads, key_dim, getattr(one, "v_head_dim", None) or key_dim)


def largest_of(sizes: Sequence[KVSize]) -> KVSize:
    """What holds KV of any of the sizes."""
    numbers = max(max(size.key_dim, size.value_dim) for size in sizes)
    return KVSize(max(size.num_kv_heads for size in sizes), numbers, numbers)


def require_alike(sizes: Sequence[KVSize], layers: Sequence[Layer]) -> None:
    """Raise ValueError unless full layers are of one size: recompression cuts all at once."""
    full = dict.fromkeys(size for size, own in zip(sizes, layers, strict=True) if own.is_full)
    if len(full) > 1:
        several = ", ".join(f"{one.num_kv_heads} x {one.key_dim} x {one.value_dim}" for one in full)
        raise ValueError(
            f"KV of its full layers (heads x numbers of a key x of a value) is {several}; it must "
            "be the same in all of them"
        )
