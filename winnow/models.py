"""A Hugging Face decoder seen layer by layer: the only file that knows transformers' internals.

`DecoderModel` drives embed → rotary tables → layers → norm → LM head itself, so that a caller can
stop, look and drop tokens between two layers. Attention goes through the `AttentionCall` that the
caller gives with each layer (winnow/attention.py).
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from winnow.attention import ATTENTION_NAME, AttentionCall, causal_attention
from winnow.errors import UnusableModel
from winnow.kv import ModelShape
from winnow.model_files import ModelDescription, describe_model, first_line

logger = logging.getLogger(__name__)

# Cosines and sines of the rotary embedding, each [B, T, head_dim].
Rope = tuple[Tensor, Tensor]

# Families whose layer-by-layer run the tests hold equal to transformers' own; any other family is
# compared when it is loaded.
VERIFIED_FAMILIES = frozenset({"llama", "qwen2", "qwen3", "mistral", "phi3"})
MLP_BLOCK_TOKENS = 2048


class TokenBlocks(nn.Module):
    """Runs an MLP over blocks of tokens, so that its wide inner activations stay small."""

    def __init__(self, mlp: nn.Module, block_tokens: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.block_tokens = block_tokens

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [B, T, hidden_size].  Returns the same shape."""
        if hidden.shape[0] * hidden.shape[1] <= self.block_tokens:
            return self.mlp(hidden)  # type: ignore[no-any-return]
        output = torch.empty_like(hidden)
        tokens, out = hidden.flatten(0, 1), output.flatten(0, 1)  # [B * T, hidden_size]
        for start in range(0, len(tokens), self.block_tokens):
            block = slice(start, start + self.block_tokens)
            # [None] gives the strides for which linear layers take the plain matrix product; a
            # slice of the three-dimensional tensor would take the batched one, twice as slow.
            out[block] = self.mlp(tokens[block][None])[0]
        return output


class DecoderModel:
    """A loaded model. Stateless between calls; every tensor it takes and gives is on `device`."""

    def __init__(self, model: Any, description: ModelDescription, device: torch.device) -> None:  # noqa: ANN401
        self._model = model
        self.description = description
        self.device = device

    @property
    def shape(self) -> ModelShape:
        return self.description.shape

    @property
    def memory_bytes(self) -> int:
        """Memory of the GPU that this process's tensors take; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    @property
    def fingerprint(self) -> str:
        return self.description.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.description.vocab_size

    @property
    def max_positions(self) -> int:
        return self.description.max_positions

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.description.eos_token_ids

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: [B, T] int64.  Returns hidden states [B, T, hidden_size]."""
        return self._model.model.embed_tokens(token_ids)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def rope(self, positions: Tensor) -> Rope:
        """The rotary tables of the given positions [B, T] int64."""
        like = torch.empty(0, dtype=self.shape.dtype, device=self.device)
        return self._model.model.rotary_emb(like, positions)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def layer(self, layer_idx: int, hidden: Tensor, rope: Rope, attention: AttentionCall) -> Tensor:
        """One decoder layer with `attention` inside.  hidden: [B, T, hidden_size], as returned."""
        output = self._model.model.layers[layer_idx](
            hidden, attention_mask=None, position_embeddings=rope, attention_call=attention
        )
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head.  hidden: [B, hidden_size].  Returns [B, vocab_size] float32."""
        return self._model.lm_head(self._model.model.norm(hidden)).float()  # type: ignore[no-any-return]


def load_model(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    mlp_block_tokens: int = MLP_BLOCK_TOKENS,
) -> DecoderModel:
    """A decoder from a folder (config, safetensors) or from the hub.

    dtype: auto, float32, bfloat16 or float16; see `describe_model`.
    Raises UnusableModel if it is missing, broken, or of a kind that cannot be pruned.
    """
    description = describe_model(model, device=device, dtype=dtype)
    network = _load_network(description, device)
    _require_decoder(description, network)
    decoder = DecoderModel(network, description, torch.device(device))
    if network.config.model_type not in VERIFIED_FAMILIES:
        _require_same_as_transformers(decoder, network)
    for layer in network.model.layers:
        layer.mlp = TokenBlocks(layer.mlp, mlp_block_tokens)
    return decoder


def _load_network(description: ModelDescription, device: str) -> Any:  # noqa: ANN401
    network: Any
    try:
        network = AutoModelForCausalLM.from_pretrained(
            description.path,
            dtype=description.shape.dtype,
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        return network.eval().requires_grad_(False).to(device)
    except (
        *(OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError),
        AssertionError,  # torch was built without the device
    ) as error:
        raise UnusableModel(
            f"model folder {description.path} cannot be loaded: {first_line(error)}"
        ) from error
    except Exception as error:  # safetensors raises its own, unrelated class
        if type(error).__module__.startswith("safetensors"):
            reason = first_line(error)
            raise UnusableModel(f"weights in {description.path} are broken: {reason}") from error
        raise


def _require_decoder(description: ModelDescription, network: Any) -> None:  # noqa: ANN401
    body: Any = getattr(network, "model", None)
    parts = ("embed_tokens", "rotary_emb", "layers", "norm")
    missing = [part for part in parts if not hasattr(body, part)]
    missing += [] if hasattr(network, "lm_head") else ["lm_head"]
    missing += [] if missing or hasattr(body.layers[0], "mlp") else ["mlp"]
    if missing:
        raise UnusableModel(
            f"{description.path} is a {network.config.model_type}, which Winnow cannot run layer "
            f"by layer: it has no {', '.join(missing)}"
        )


@torch.inference_mode()
def _require_same_as_transformers(decoder: DecoderModel, network: Any) -> None:  # noqa: ANN401
    """Compare our layer loop with the model's own forward on a few tokens; refuse a difference."""
    family = network.config.model_type
    num_tokens = min(16, decoder.max_positions)
    token_ids = torch.arange(num_tokens, device=decoder.device).remainder(decoder.vocab_size)[None]
    try:
        ours = _run_layers(decoder, token_ids)
        network.set_attn_implementation("eager")
        theirs = network(token_ids, use_cache=False).logits[0, -1].float()
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise UnusableModel(f"family {family} cannot be run layer by layer: {error}") from error
    finally:
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
