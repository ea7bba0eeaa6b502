"""The state of a recurrent layer: tensors of one size, however many tokens it has seen."""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

StateKind = Literal["conv", "recurrent"]


@dataclass(frozen=True, slots=True)
class StatePart:
    """One tensor of a layer's state, of one sequence.

    kind, idx: a convolution's last inputs, or a matrix; a layer may have several of each.
    """

    kind: StateKind
    idx: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{' x '.join(map(str, self.shape))} {dtype}"


class LayerState:
    """The state of one layer for B sequences, as the Cache that transformers' layers take.

    A layer reads it, then replaces its tensors or changes them in place. Before the first token it
    has none. Keys and values are given back as they are: attention has its own place for them.
    """

    def __init__(self, parts: tuple[StatePart, ...] = (), tensors: tuple[Tensor, ...] = ()) -> None:
        """tensors: [B, *shape] of each part; the state's own from now on."""
        places = ((part.kind, part.idx) for part in parts)
        self._held: dict[tuple[StateKind, int], Tensor] = dict(zip(places, tensors, strict=True))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Each part's [B, *shape], in the order of `parts`."""
        return tuple(self._held[place] for place in sorted(self._held))

    @property
    def parts(self) -> tuple[StatePart, ...]:
        return tuple(
            StatePart(kind, idx, tuple(tensor.shape[1:]), tensor.dtype)
            for (kind, idx), tensor in sorted(self._held.items(), key=lambda item: item[0])
        )

    def become(self, other: "LayerState") -> None:
        """Have the other's tensors, which none of both may change in place."""
        self._held = dict(other._held)

    # What layers call

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._held.get(("conv", state_idx))

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,  # noqa: ANN401 - a family's own
    ) -> Tensor:
        """Add inputs [B, channels, T]; returns them after the last ones of before, or zeros."""
        before = self._held.get(("conv", state_idx))
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        if before is None:
            padding = max(0, size - conv_states.shape[-1])
            inputs = torch.nn.functional.pad(conv_states, (padding, 0))
        else:
            size = before.shape[-1]
            inputs = torch.cat([before, conv_states], dim=-1)
        self._held["conv", state_idx] = inputs[..., -size:].contiguous()
        return inputs

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._held.get(("recurrent", state_idx))

    def update_recurrent_state(
        self,
        recurrent_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        **_: Any,  # noqa: ANN401 - a family's own
    ) -> Tensor:
        before = self._held.get(("recurrent", state_idx))
        dtype = recurrent_states.dtype if before is None else before.dtype
        self._held["recurrent", state_idx] = recurrent_states.to(dtype)
        return self._held["recurrent", state_idx]

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        self.update_recurrent_state(linear_cache, layer_idx)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update(
        self,
        keys: Tensor,
        values: Tensor,
        *_: Any,  # noqa: ANN401 - a family's own
    ) -> tuple[Tensor, Tensor]:
        return keys, values
