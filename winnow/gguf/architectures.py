"""The architectures whose files Winnow reads, and how their tensors are called in transformers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from winnow.errors import UnusableModel
from winnow.gguf.header import Header

_ATTENTION = {f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"}
_ATTENTION |= {"attn_output": "self_attn.o_proj"}
_HEAD_NORMS = {f"attn_{name}_norm": f"self_attn.{name}_norm" for name in "qk"}
_MLP = {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_NORMS_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NORMS_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PLAIN = _ATTENTION | _MLP | _NORMS_BEFORE
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = re.compile(r"blk\.(\d+)\.([^.]+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What is particular to one.

    layer: names of a layer's tensors in transformers, by their names in the file. `{}` stands for
    an expert's number: the file has all experts of a layer in one tensor.
    sizes: of the configuration, by the file's names, beside those that all have.
    paired_heads: rows of queries and keys that rotate together stand next to each other; in
    transformers they are half a head apart.
    partial_rotary: heads may rotate in part.
    norm_offset: what weights of norms have in the file above those in transformers.
    full_every: where the file does not say which layers slide: all but one in so many.
    local_rope_base: of sliding layers, whose rotary tables are their own, where the file is silent.
    largest_num_layers: of the model whose queries are scaled by hidden size / heads, and not by the
    size of a head; no file says so.
    """

    model_type: str
    layer: Mapping[str, str]
    sizes: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    paired_heads: bool = False
    partial_rotary: bool = False
    norm_offset: float = 0.0
    full_every: int | None = None
    local_rope_base: float | None = None
    largest_num_layers: int | None = None

    def tensor_name(self, name: str) -> str:
        """The name in transformers; a name that is not known stays as it is."""
        if found := _IN_LAYER.fullmatch(name):
            layer_idx, own, kind = found.groups()
            if theirs := self.layer.get(own):
                return f"model.layers.{layer_idx}.{theirs}.{kind}"
        own, _, kind = name.rpartition(".")
        return f"{_OUTSIDE[own]}.{kind}" if own in _OUTSIDE else name

    def is_paired(self, name: str) -> bool:
        return self.paired_heads and bool(re.search(r"\.attn_[qk]\.", name))

    def offset(self, name: str) -> float:
        """What a tensor of the file has above the one in transformers."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0


_MIXTRAL = Architecture(
    "mixtral",
    _ATTENTION
    | _NORMS_BEFORE
    | {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
    sizes={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    paired_heads=True,
)
_GEMMA_2 = _ATTENTION | _MLP | _NORMS_AFTER
_GEMMA_2 |= {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
_SLIDING = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_ARCHITECTURES = {
    "llama": Architecture("llama", _PLAIN, paired_heads=True),  # Mistral's files say so as well
    "qwen2": Architecture("qwen2", _PLAIN),
    "qwen3": Architecture("qwen3", _PLAIN | _HEAD_NORMS),
    "qwen3moe": Architecture(
        "qwen3_moe",
        _ATTENTION
        | _NORMS_BEFORE
        | _HEAD_NORMS
        | {"ffn_gate_inp": "mlp.gate"}
        | {f"{own}_exps": theirs.replace(".", ".experts.{}.") for own, theirs in _MLP.items()},
        sizes={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        options={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "phi3": Architecture(
        "phi3",
        _PLAIN | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        sizes={"attention.sliding_window": "sliding_window"},
        partial_rotary=True,
    ),
    "olmo2": Architecture("olmo2", _ATTENTION | _MLP | _HEAD_NORMS | _NORMS_AFTER),
    "smollm3": Architecture("smollm3", _PLAIN, paired_heads=True),
    "gemma": Architecture("gemma", _PLAIN, norm_offset=1),
    "gemma2": Architecture(
        "gemma2", _GEMMA_2, sizes=_SLIDING, norm_offset=1, full_every=2, largest_num_layers=46
    ),
    "gemma3": Architecture(
        "gemma3_text",
        _GEMMA_2 | _HEAD_NORMS,
        sizes=_SLIDING,
        norm_offset=1,
        full_every=6,
        local_rope_base=10_000.0,
        largest_num_layers=62,
    ),
}


def architecture_of(header: Header) -> Architecture:
    """Raises UnusableModel for one that Winnow does not read."""
    name = header.architecture
    if name == "llama" and header.values.get("llama.expert_count"):
        return _MIXTRAL
    if name not in _ARCHITECTURES:
        raise UnusableModel(
            f"{header.path} is a GGUF file of architecture {name}; Winnow reads those of "
            f"{', '.join(_ARCHITECTURES)}. Other families run from a folder of safetensors"
        )
    return _ARCHITECTURES[name]
