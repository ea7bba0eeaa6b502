"""The model: a Qwen2 whose initial weights can look back, copy, and follow a link.

Small models take very long to learn the building blocks of retrieval, so these are written into the
initial weights (training/circuits.py) and then trained like everything else. The layers from
`NUM_FREE_LAYERS` on share their weights (Universal Transformer, arXiv 1807.03819): a look-up that
is learned once can be repeated, so a chain of look-ups takes as many layers as it has links, and
once nothing is left to look up nothing changes. The exported model is a plain Qwen2 with the
repeated weights written out.
"""

import math

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from training import circuits
from training.circuits import NUM_HEADS, NUM_KV_HEADS
from training.tokenizer import MAX_POSITIONS, VOCAB_SIZE

NUM_LAYERS, NUM_FREE_LAYERS = 16, 4
WEIGHT_GAIN = 0.7
OUTPUT_GAIN = 0.2
FINAL_NORM = 0.2


def make_config() -> Qwen2Config:
    """The config; a RoPE base of 1e12 leaves two thirds of the pairs nearly still at 8k."""
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=circuits.HIDDEN,
        intermediate_size=384,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def make_model(seed: int, assigns: int) -> Qwen2ForCausalLM:
    """A newly initialized fp32 model; the same seed gives the same weights.

    assigns: ID of the token ` =` (see training/circuits.py).
    """
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(make_config())
    for name, parameter in model.named_parameters():
        _init_parameter(name, parameter)
    model.model.norm.weight.data.fill_(FINAL_NORM)
    circuits.lay_out(model, NUM_FREE_LAYERS, assigns)
    layers = model.model.layers
    for layer_idx in range(NUM_FREE_LAYERS + 1, NUM_LAYERS):
        layers[layer_idx] = layers[NUM_FREE_LAYERS]
    return model


def _init_parameter(name: str, parameter: nn.Parameter) -> None:
    if parameter.ndim == 1:
        nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        return
    is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
    gain = OUTPUT_GAIN if is_output else WEIGHT_GAIN
    nn.init.normal_(parameter, std=gain / math.sqrt(parameter.shape[1]))
