"""A tiny random model of every causal-LM family of transformers, and what Winnow makes of it."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models_in_code import VOCAB_SIZE, save_byte_tokenizer
from tests.winnow import reference
from tests.winnow.drive import (
    GREEDY,
    UNPRUNED,
    admit,
    decode_all,
    ids,
    make_engine,
    prefill_all,
    prompt,
    spec,
)
from winnow.decoder import DecoderModel
from winnow.engine.prefix.store import PrefixStore
from winnow.errors import UnusableModel
from winnow.layers import Layer
from winnow.model_files import load_config
from winnow.models import load_model

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WINDOW = 8
_PROMPT_LENGTHS = (5, 5 * WINDOW + 3)
_NEW_TOKENS = 6
_GREEDY = replace(GREEDY, max_tokens=_NEW_TOKENS)
_NUM_LAYERS = 4
_NAMED = re.compile(r"^Winnow cannot run [\w-]+: ")

# What a configuration is given, of the names that it has.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": _NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "emb_dim": 64,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    # recurrent layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 128,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "state_size": 16,
    # older names
    "n_embd": 64,
    "n_layer": _NUM_LAYERS,
    "n_layers": _NUM_LAYERS,
    "num_layers": _NUM_LAYERS,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "n_positions": 512,
    "max_seq_len": 512,
    "d_model": 64,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "word_embed_proj_dim": 64,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    # factors that are 1 otherwise
    "embedding_multiplier": 6.0,
    "logits_scaling": 4.0,
    "lm_head_multiplier": 0.5,
    "mup_enabled": True,
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_OF_ONE_KIND = ({_FULL}, {_SLIDING})
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_BY_LAYER: dict[str, Any] = {"rope_parameters": {_FULL: _ROPE, _SLIDING: _ROPE}}
_BOTH: dict[str, Any] = {"layer_types": [_SLIDING, _FULL] * (_NUM_LAYERS // 2)}
# Layers that attend to everything have fewer KV heads and longer keys and values.
_GEMMA4: dict[str, Any] = _BOTH | {
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
}
# Of families that are not those of their text parts, and what such a part has to say.
_TEXTS = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}
_ASSISTANTS = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": _NUM_LAYERS,
}
# Tables of longrope, and temperatures, that change within the prompts.
_LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 2 * WINDOW,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}
_LONG: dict[str, Any] = {
    "rope_parameters": _LONG_ROPE,
    "original_max_position_embeddings": 2 * WINDOW,
}
_TEMPERATURE = {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 2 * WINDOW}
# What a family needs besides.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": _GEMMA4 | {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2},
    "gemma4_unified_text": _GEMMA4,
    "granitemoehybrid": {"layer_types": ["linear_attention", _FULL] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", _FULL] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", _FULL] * 2},
    "mimo_v2_flash": _BOTH | {"head_dim": 24, "v_head_dim": 16},
    "minimax": {"sliding_window": None},
    "nemotron_h": {"layer_types": ["linear_attention", "mlp", _FULL, "moe"]},
    "llama4_text": {"floor_scale": WINDOW, "attn_scale": 0.5},
    "ministral3": {"rope_parameters": _ROPE | _TEMPERATURE},
    "phi3": _LONG,
    "phi4_multimodal": _LONG
    | {
        "vision_config": {"num_hidden_layers": 1},
        "audio_config": {"num_blocks": 1},
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "beam": {"rope_parameters": {_FULL: None, _SLIDING: _ROPE}},
    "cohere_compass_text": _BY_LAYER,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8}},
    "doge": {"sliding_window": None},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3_text": _BOTH,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "kolibri1": _BOTH,
    "longcat_flash": {"expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "moshi": {"sliding_window": 512},
    "phimoe": {
        "sliding_window": None,
        "rope_parameters": _LONG_ROPE | {"short_mscale": 1.2, "long_mscale": 1.5},
    },
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2},
    "codegen": {"rotary_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """kinds: of the layers, of a family that runs, of each configuration that was tried.

    reason: why another one does not.
    """

    family: str
    kinds: tuple[tuple[str, ...], ...] = ()
    reason: str | None = None


def _kind(layer: Layer) -> str:
    has_both = layer.has_kv and layer.is_recurrent
    return f"{layer} with a state" if has_both else str(layer)


def outcome(family: str, folder: Path) -> Outcome:
    """Load tiny models of the family, and answer as transformers does, or be refused.

    Raises AssertionError where the answer is another one.
    """
    try:
        kinds = [
            _kinds(config, folder / str(idx)) for idx, config in enumerate(tiny_configs(family))
        ]
    except UnusableModel as error:
        return Outcome(family, reason=_line(error, folder))
    return Outcome(family, tuple(dict.fromkeys(kinds)))


def _kinds(config: Any, folder: Path) -> tuple[str, ...]:
    """Those of the layers of a model of the configuration, which answers as transformers does."""
    config.save_pretrained(folder)
    load_config(folder)
    path = save_network(config, folder)
    model = load_model(path)
    engine, network = make_engine(model), reference.load(path, "eager")
    prompts = {str(n): prompt(n, seed=n) for n in _PROMPT_LENGTHS}
    for name, token_ids in prompts.items():
        admit(engine, spec(name, len(token_ids), _GREEDY), token_ids)
    answers = {name: ids(tokens) for name, tokens in decode_all(engine).items()}
    expected = {name: reference.greedy(network, own, _NEW_TOKENS) for name, own in prompts.items()}
    assert answers == expected
    _require_same_from_store(model)
    return tuple(dict.fromkeys(map(_kind, model.shape.layers)))


def _require_same_from_store(model: DecoderModel) -> None:
    """A prompt whose beginning another one had is computed as it is without that one."""
    store = PrefixStore(model, 1 << 24, block_tokens=WINDOW)
    token_ids = prompt(_PROMPT_LENGTHS[1], seed=1)
    is_long = model.description.is_long(len(token_ids))
    prefill_all(model, token_ids[: 3 * WINDOW + 3], UNPRUNED, store, is_long=is_long)
    (layers, result), (others, expected) = (
        prefill_all(model, token_ids, UNPRUNED, own, is_long=is_long) for own in (store, None)
    )
    found, wanted = (model.logits(own.final_hidden[None]) for own in (result, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(layers, others, strict=True):
        torch.testing.assert_close(ours.states, theirs.states, rtol=1e-3, atol=1e-3)
    report = result.report
    assert report.num_cached_tokens > 0 or report.no_prefix_reason == "recurrent_layers"


def _line(error: UnusableModel, folder: Path) -> str:
    """Its message without what names the family."""
    return _NAMED.sub("", str(error).replace(f"{folder}/0/", ""))


def save_network(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    for name, parameter in network.named_parameters():
        if "norm" not in name:  # larger than usual, so that greedy choices are clear-cut
            torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def tiny_config(family: str, **changes: Any) -> Any:
    """Of a family with several networks, that of its text.

    It has all kinds of layers that the family's default configuration has.
    """
    if family in _TEXTS:
        texts = tiny_config(_TEXTS[family]).to_dict() | _ASSISTANTS
        drafting: Any = CONFIG_MAPPING[family]
        return drafting(text_config=texts)
    kind = _text_kind(family)
    names = _names(kind)
    sizes = {name: value for name, value in _SIZES.items() if name in names}
    sizes |= _OWN.get(kind.model_type, {}) | changes
    usual, config = _layer_types(kind()), kind(**sizes)
    if usual <= _layer_types(config):
        return config
    types = sorted(usual) * _NUM_LAYERS
    return kind(**sizes | {"layer_types": types[:_NUM_LAYERS]})


def tiny_configs(family: str) -> list[Any]:
    """`tiny_config`; and with windows, or without, if that one has layers of one kind alone.

    Of a family whose text part is none of transformers' causal language models, the whole's.
    """
    if family in _TEXTS:
        return [tiny_config(family)]
    kind = _text_kind(family)
    if kind.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return [CONFIG_MAPPING[family]()]
    config, names = tiny_config(family), _names(kind)
    if "sliding_window" not in names or "sliding_window" in _OWN.get(kind.model_type, {}):
        return [config]
    others: dict[str, Any] = {"use_sliding_window": True} if "use_sliding_window" in names else {}
    types = _layer_types(config)
    if "layer_types" in names and types in _OF_ONE_KIND:
        return [config, tiny_config(family, **others, **_BOTH)]
    if not types:
        other = None if getattr(config, "sliding_window", None) else WINDOW
        return [config, tiny_config(family, **others | {"sliding_window": other})]
    return [config]


def _text_kind(family: str) -> Any:
    kind: Any = CONFIG_MAPPING[family]
    return type(kind().get_text_config()) if "text_config" in kind.sub_configs else kind


def _layer_types(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def _names(kind: Any) -> set[str]:
    return {*inspect.signature(kind.__init__).parameters, *_fields(kind)}


def _fields(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        yield from vars(base).get("__annotations__", ())
