"""The model: a Qwen2 of 4.9 M parameters whose first layers start out looking a few tokens back.

Retrieval needs "the token before this one" as a building block, and small models take very long to
find it. Here three query heads of layer 0, and three of layer 1, have it from the start: their KV
head's keys are constant (zero weights, a bias), so that after RoPE the logit depends on the
distance alone and peaks at one offset: 1, 2, 3 tokens in layer 0, then 1, 4, 8 in layer 1. After
two layers a token thus knows the eleven before it, which covers a key of several tokens and the
words between it and its number. The heads stay trainable.
"""

import math

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from training.tokenizer import MAX_POSITIONS, VOCAB_SIZE

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 32
NUM_SEEDED_PAIRS = 5
SEEDED_OFFSETS = {0: (1, 2, 3), 1: (1, 4, 8)}  # by layer
SEEDED_PAIR_LOGIT = 14.0  # at 8, a tenth of the attention leaks at 4k tokens; at 14, under 1%
WEIGHT_GAIN = 0.7


def make_config() -> Qwen2Config:
    """Shapes and RoPE base; a base of 1e6 leaves a third of the pairs nearly still at 8k tokens."""
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=NUM_HEADS * HEAD_DIM,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def make_model(seed: int) -> Qwen2ForCausalLM:
    """A freshly initialised fp32 model; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(make_config())
    for name, parameter in model.named_parameters():
        _init_parameter(name, parameter)
    for layer_idx, offsets in SEEDED_OFFSETS.items():
        _seed_previous_token_heads(model, layer_idx, offsets)
    return model


def _init_parameter(name: str, parameter: nn.Parameter) -> None:
    if parameter.ndim == 1:
        nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        return
    is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
    gain = WEIGHT_GAIN / 2 if is_output else WEIGHT_GAIN
    nn.init.normal_(parameter, std=gain / math.sqrt(parameter.shape[1]))


@torch.no_grad()
def _seed_previous_token_heads(
    model: Qwen2ForCausalLM, layer_idx: int, offsets: tuple[int, ...]
) -> None:
    attention = model.model.layers[layer_idx].self_attn
    attention.q_proj.weight[: len(offsets) * HEAD_DIM] = 0
    attention.k_proj.weight[:HEAD_DIM] = 0
    frequencies = model.model.rotary_emb.inv_freq[:NUM_SEEDED_PAIRS]
    # q·k / √d = Σ amplitude² cos(angle) / √d, so each pair carries SEEDED_PAIR_LOGIT at its peak.
    amplitude = math.sqrt(SEEDED_PAIR_LOGIT * math.sqrt(HEAD_DIM))
    attention.k_proj.bias[:HEAD_DIM] = amplitude * _rotary_bias(torch.zeros_like(frequencies))
    for head, offset in enumerate(offsets):
        bias = _rotary_bias(-offset * frequencies)  # the phase turned back by the offset
        attention.q_proj.bias[head * HEAD_DIM : (head + 1) * HEAD_DIM] = amplitude * bias


def _rotary_bias(phases: Tensor) -> Tensor:
    """Unit vectors at `phases` in the fastest pairs; pair i is (i, i + HEAD_DIM / 2)."""
    bias = torch.zeros(HEAD_DIM)
    bias[: len(phases)] = phases.cos()
    bias[HEAD_DIM // 2 : HEAD_DIM // 2 + len(phases)] = phases.sin()
    return bias
