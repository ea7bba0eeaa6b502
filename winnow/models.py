"""Loading a decoder from a model folder.

`load_model` returns a model that has completed a test prompt, or raises an error with a one-line
reason.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from winnow.attention import ATTENTION_NAME, causal_attention
from winnow.checkpoint import require_complete, require_sound
from winnow.decoder import DecoderModel, TokenBlocks
from winnow.errors import UnusableModel
from winnow.folder_errors import as_unusable
from winnow.gguf.header import read_header
from winnow.gguf.weights import weights
from winnow.model_files import ModelDescription, describe_model, load_config
from winnow.proof import require_runs

logger = logging.getLogger(__name__)

# Families whose layer-by-layer run the tests compare with transformers; any other family is
# compared when it is loaded.
VERIFIED_FAMILIES = frozenset({"llama", "qwen2", "qwen3", "mistral", "phi3"})
MLP_BLOCK_TOKENS = 2048


def load_model(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    max_model_len: int | None = None,
    mlp_block_tokens: int = MLP_BLOCK_TOKENS,
) -> DecoderModel:
    """Load a decoder from a folder (config, safetensors) or from the hub.

    dtype, max_model_len: see `describe_model`.
    Raises UnusableModel if it is missing, broken, or of a kind that cannot be pruned.
    """
    description = describe_model(model, device=device, dtype=dtype, max_model_len=max_model_len)
    require_sound(description)
    network = _load_network(description, device)
    decoder = DecoderModel(network, description, torch.device(device))
    if network.config.model_type not in VERIFIED_FAMILIES:
        _require_same_as_transformers(decoder, network)
    for layer in network.model.layers:
        layer.mlp = TokenBlocks(layer.mlp, mlp_block_tokens)
    require_runs(decoder)
    return decoder


def _load_network(description: ModelDescription, device: str) -> Any:  # noqa: ANN401
    with as_unusable(f"model {description.path} cannot be loaded"):
        load = _load_folder if description.path.is_dir() else _load_gguf
        network, found = load(
            description.path,
            dtype=description.shape.dtype,
            attn_implementation=ATTENTION_NAME,
            output_loading_info=True,
        )
        require_complete(description, found["missing_keys"], found["unexpected_keys"])
        return network.eval().requires_grad_(False).to(device)


def _load_folder(path: Path, **options: Any) -> Any:  # noqa: ANN401
    return AutoModelForCausalLM.from_pretrained(
        path, local_files_only=True, use_safetensors=True, trust_remote_code=False, **options
    )


def _load_gguf(path: Path, *, dtype: torch.dtype, **options: Any) -> Any:  # noqa: ANN401
    """Tensors are dequantized one by one, so that never more than a few are there twice."""
    config = load_config(path)
    with torch.device("meta"):
        network_class: Any = type(AutoModelForCausalLM.from_config(config))
    state = weights(read_header(path), dtype)
    return network_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, **options
    )


@torch.inference_mode()
def _require_same_as_transformers(decoder: DecoderModel, network: Any) -> None:  # noqa: ANN401
    """Compare our layer loop with the model's own forward; raise UnusableModel if they differ."""
    family = network.config.model_type
    num_tokens = min(16, decoder.max_positions)
    token_ids = torch.arange(num_tokens, device=decoder.device).remainder(decoder.vocab_size)[None]
    with as_unusable(f"family {family} cannot be run layer by layer"):
        ours = _run_layers(decoder, token_ids)
        network.set_attn_implementation("eager")
        theirs = network(token_ids, use_cache=False).logits[0, -1].float()
        network.set_attn_implementation(ATTENTION_NAME)
    tolerance = 1e-3 if decoder.shape.dtype == torch.float32 else 5e-2
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if not difference <= tolerance:
        raise UnusableModel(
            f"family {family} computes something between its layers that Winnow does not: its "
            f"logits differ by {difference:.2g} of their size, the limit is {tolerance:g}"
        )
    logger.info(
        "family %s is not in the verified list; its logits agree (%.1g)", family, difference
    )


def _run_layers(decoder: DecoderModel, token_ids: Tensor) -> Tensor:
    positions = torch.arange(token_ids.shape[1], device=decoder.device)[None]
    hidden, rope = decoder.embed(token_ids), decoder.rope(positions)
    for layer_idx in range(decoder.shape.num_layers):
        hidden = decoder.layer(
            layer_idx, hidden, rope, lambda _, q, k, v, scaling: causal_attention(q, k, v, scaling)
        )
    return decoder.logits(hidden[:, -1])[0]
