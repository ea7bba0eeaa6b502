"""A random Llama, made on the device."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.on_device.section import Bench
from winnow.attention import ATTENTION_NAME
from winnow.decoder import MLP_BLOCK_TOKENS, DecoderModel, TokenBlocks
from winnow.fused_layer import fuse_layers
from winnow.model_files import ModelDescription
from winnow.network import Network


def random_network(bench: Bench) -> Any:  # noqa: ANN401
    """The model of transformers, with attention of its own."""
    config = LlamaConfig(**bench.scale.model)
    with torch.device(bench.device):
        network: Any = AutoModelForCausalLM.from_config(
            config, dtype=bench.dtype, attn_implementation="sdpa"
        )
    return network.eval().requires_grad_(False)


def as_decoder(network: Any, bench: Bench) -> DecoderModel:  # noqa: ANN401
    """The network run by Winnow, with transformers' layers; it is Winnow's from then on."""
    network.set_attn_implementation(ATTENTION_NAME)
    description = ModelDescription(
        path=Path("random"),
        model_type=network.config.model_type,
        fingerprint="random",
        shape=bench.shape,
        vocab_size=network.config.vocab_size,
        max_positions=network.config.max_position_embeddings,
        eos_token_ids=frozenset(),
    )
    return DecoderModel(Network(network), description, bench.device)


def fuse(network: Any, bench: Bench) -> bool:  # noqa: ANN401
    """Give the network the layers that `load_model` gives to one of a folder; False if it fails."""
    if fuse_layers(network, bench.shape, MLP_BLOCK_TOKENS):
        return True
    for layer in network.model.layers:
        layer.mlp = TokenBlocks(layer.mlp, MLP_BLOCK_TOKENS)
    return False


def random_decoder(bench: Bench) -> DecoderModel:
    """A random Llama as `load_model` returns one of a folder."""
    network = random_network(bench)
    model = as_decoder(network, bench)
    fuse(network, bench)
    return model


def step_bytes(network: Any) -> int:  # noqa: ANN401
    """Bytes of the weights that a decode step reads: all but the table of embeddings."""
    table = network.model.embed_tokens.weight
    parameters = sum(part.nbytes for part in network.parameters())
    return int(parameters if network.lm_head.weight is table else parameters - table.nbytes)
