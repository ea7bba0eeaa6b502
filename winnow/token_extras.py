"""What some families' layers take of their tokens besides hidden states and rotary tables."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class TokenExtras:
    """Of T tokens of B sequences.

    inputs: [B, T, num_layers, size], what each layer takes of a token; None if they take nothing.
    shared: keys and values [B, H_kv, T, numbers] by kind of layer. The last layer of a kind that
    computes its own puts them there; later ones of the kind attend with them.
    """

    inputs: Tensor | None = None
    shared: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def take(self, tokens: Tensor | slice) -> "TokenExtras":
        """Those of some of the T tokens: of a slice, or of indices [num_tokens] int64."""
        inputs = None if self.inputs is None else self.inputs[:, tokens]
        shared = {
            kind: (keys[:, :, tokens], values[:, :, tokens])
            for kind, (keys, values) in self.shared.items()
        }
        return TokenExtras(inputs, shared)

    def options(self, layer_idx: int) -> Iterator[tuple[str, Any]]:
        """What one of transformers' layers is called with."""
        yield "shared_kv_states", self.shared
        if self.inputs is not None:
            yield "per_layer_input", self.inputs[:, :, layer_idx]


class LayerInputs(nn.Module):
    """Computes each layer's input of a token, from its id and its embedding."""

    def __init__(self, body: Any, num_layers: int) -> None:  # noqa: ANN401
        super().__init__()
        self._num_layers = num_layers
        self.table = body.embed_tokens_per_layer
        self.projection = body.per_layer_model_projection
        self.norm = body.per_layer_projection_norm
        self._projection_scale: float = body.per_layer_model_projection_scale
        self._scale: float = body.per_layer_input_scale

    def forward(self, token_ids: Tensor, embeddings: Tensor) -> Tensor:
        """token_ids: [B, T].  embeddings: [B, T, hidden_size].  Returns as `TokenExtras.inputs`."""
        size = (*token_ids.shape, self._num_layers, -1)
        projected = (self.projection(embeddings) * self._projection_scale).view(size)
        inputs: Tensor = self.norm(projected) + self.table(token_ids).view(size)
        return inputs * self._scale


def layer_inputs_of(body: Any, num_layers: int) -> LayerInputs | None:  # noqa: ANN401
    """None for a network whose layers take no inputs of a token's own."""
    has_any = getattr(body, "embed_tokens_per_layer", None) is not None
    return LayerInputs(body, num_layers) if has_any else None


def sharing_kinds(config: Any) -> dict[int, str]:  # noqa: ANN401
    """The layers whose keys and values later ones attend with, and of what kind they are."""
    modes = getattr(config, "kv_sharing_modes", ())
    return {idx: config.layer_types[idx] for idx, mode in enumerate(modes) if mode == "store"}
