"""A model's configuration out of a GGUF file, as transformers names its values.

What a file says of its network and nobody here reads is refused: left out, it would be computed
wrongly without a word.
"""

import math
from collections.abc import Sequence
from typing import Any

from winnow.errors import UnusableModel
from winnow.gguf.architectures import Architecture, architecture_of
from winnow.gguf.header import Header
from winnow.gguf.weights import checkpoint_dtype, read_numbers

_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_WITHOUT_EFFECT = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
_DEFAULT_ROPE_BASE = 10_000.0
# Llama 3.1 and what came of it; a file has the factors that follow from these.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_ORIGINAL_LENGTH = 8192


class _Values:
    """The values of a file about its network, and which of them were asked for."""

    def __init__(self, header: Header) -> None:
        prefix = f"{header.architecture}."
        self._values = {
            name.removeprefix(prefix): value
            for name, value in header.values.items()
            if name.startswith(prefix)
        }
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - of any type
        """A list, with a value for each layer, is that value where all are the same."""
        self._read.add(name)
        value = self._values.get(name, default)
        if isinstance(value, list) and len(set(value)) == 1:
            return value[0]
        if isinstance(value, list):
            raise ValueError(f"{name} differs between layers: {', '.join(map(str, value[:8]))}")
        return value

    def get_each(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """A value for each layer as a list, or one for all."""
        self._read.add(name)
        return self._values.get(name, default)

    def not_read(self) -> list[str]:
        """Names of values that say something; llama.cpp writes 0 for nothing."""
        rest = self._values.keys() - self._read - _WITHOUT_EFFECT
        return sorted(name for name in rest if self._values[name] not in (0, "", "none"))


def configuration(header: Header) -> dict[str, Any]:
    """What transformers' AutoConfig.for_model takes.

    Raises UnusableModel or ValueError for a network that cannot be told from the file, or is not
    one that Winnow reads.
    """
    architecture, values = architecture_of(header), _Values(header)
    config: dict[str, Any] = {"model_type": architecture.model_type, **architecture.options}
    for own, name in {**_SIZES, **architecture.sizes}.items():
        if (value := values.get(own)) is not None:
            config[name] = value if value or own in _SIZES else None  # 0 stands for none
    config["head_dim"] = head_dim = _head_dim(values, config)
    config |= _sliding(architecture, header, values, config) | {
        "rope_parameters": _rope(header, values, head_dim),
        "vocab_size": _vocab_size(header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in header.tensors,
        "dtype": checkpoint_dtype(header),
        **{
            f"{name}_token_id": header.values.get(f"tokenizer.ggml.{name}_token_id")
            for name in ("bos", "eos")
        },
        "pad_token_id": header.values.get("tokenizer.ggml.padding_token_id"),
    }
    rotary = values.get("rope.dimension_count") or head_dim
    if architecture.partial_rotary:
        config["rope_parameters"]["partial_rotary_factor"] = rotary / head_dim
    elif rotary != head_dim:
        raise ValueError(f"{rotary} of the {head_dim} numbers of a head rotate; all must")
    if architecture.local_rope_base:
        local = values.get("rope.freq_base_swa", architecture.local_rope_base)
        config["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    if others := values.not_read():
        raise UnusableModel(
            f"{header.path} is a {header.architecture} with {', '.join(others)}, which Winnow does "
            "not compute"
        )
    return config


def _vocab_size(header: Header) -> int:
    embeddings = header.tensors.get("token_embd.weight")
    if embeddings is None:
        raise UnusableModel(f"{header.path} has no tensor token_embd.weight: it is no whole model")
    return embeddings.shape[0]


def _head_dim(values: _Values, config: dict[str, Any]) -> int:
    num_heads, hidden_size = config.get("num_attention_heads"), config.get("hidden_size")
    if not num_heads or not hidden_size:
        raise ValueError("it does not say how many attention heads there are, or how large")
    head_dim = int(values.get("attention.key_length") or hidden_size // num_heads)
    value_dim = values.get("attention.value_length") or head_dim
    if value_dim != head_dim:
        raise ValueError(f"keys have {head_dim} numbers, and values {value_dim}; they must agree")
    return head_dim


def _sliding(
    architecture: Architecture, header: Header, values: _Values, config: dict[str, Any]
) -> dict[str, Any]:
    """Which layers slide, and how queries are scaled; no layer does without a window."""
    if architecture.full_every is None:
        return {}
    num_layers = config.get("num_hidden_layers", 0)
    if not 0 < num_layers <= len(header.tensors):
        raise ValueError(f"it has {num_layers} layers, and {len(header.tensors)} tensors")
    pattern = values.get_each("attention.sliding_window_pattern", architecture.full_every)
    if not config.get("sliding_window"):
        pattern = 1
    if not isinstance(pattern, list):
        if not isinstance(pattern, int) or pattern < 1:
            raise ValueError(f"attention.sliding_window_pattern is {pattern!r}")
        pattern = [(idx + 1) % pattern > 0 for idx in range(num_layers)]
    if len(pattern) != num_layers:
        raise ValueError(f"its sliding_window_pattern has {len(pattern)} of {num_layers} layers")
    is_largest = num_layers == architecture.largest_num_layers
    width = config["hidden_size"] // config["num_attention_heads"]
    return {
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
        "query_pre_attn_scalar": width if is_largest else config["head_dim"],
    }


def _rope(header: Header, values: _Values, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": values.get("rope.freq_base", _DEFAULT_ROPE_BASE),
    }
    if "rope_freqs.weight" in header.tensors:
        rope |= _llama3_rope(read_numbers(header.tensors["rope_freqs.weight"]), rope, head_dim)
    if "rope_factors_long.weight" in header.tensors:
        return rope | _longrope(header, values)
    kind = values.get("rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise ValueError(f"its rotary tables are scaled by {kind}; readable are linear and yarn")
    rope |= {"rope_type": kind, "factor": values.get("rope.scaling.factor")}
    if kind == "yarn":
        optional = {
            "original_max_position_embeddings": values.get("rope.scaling.original_context_length"),
            "beta_fast": values.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": values.get("rope.scaling.yarn_beta_slow"),
        }
        rope |= {name: value for name, value in optional.items() if value}
    return rope


def _longrope(header: Header, values: _Values) -> dict[str, Any]:
    values.get("rope.scaling.type")
    long, short = (
        read_numbers(header.tensors[f"rope_factors_{name}.weight"]) for name in ("long", "short")
    )
    attention_factor = values.get("rope.scaling.attn_factor")
    return {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": values.get("rope.scaling.original_context_length"),
    } | ({"attention_factor": attention_factor} if attention_factor else {})


def _llama3_rope(factors: Sequence[float], rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The parameters from which the file's factors follow; nothing where all are 1."""
    factor = max(factors)
    if factor == min(factors) == 1:
        return {}
    low, high = _LLAMA3_ROPE.values()
    expected = []
    for idx in range(head_dim // 2):
        turns = _LLAMA3_ORIGINAL_LENGTH / (2 * math.pi * rope["rope_theta"] ** (2 * idx / head_dim))
        share = min(max((turns - low) / (high - low), 0), 1)
        expected.append(1 / ((1 - share) / factor + share))
    close = (math.isclose(a, b, rel_tol=1e-3) for a, b in zip(factors, expected, strict=False))
    if len(factors) != len(expected) or not all(close):
        raise ValueError("its rotary frequencies have factors that are not those of Llama 3")
    return _LLAMA3_ROPE | {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_LENGTH,
    }
