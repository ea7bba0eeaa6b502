"""The KV cache of one prompt after prefill: ragged, with original positions.

KV heads of a layer may keep different entries, so a layer is stored flat: the entries of head 0 in
prompt order, then those of head 1, and so on.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.checks import require_choice
from winnow.kv_quantization import dequantize, quantize
from winnow.layer_state import StatePart
from winnow.layers import FULL, Layer

# How keys and values are held and sent: in the model's dtype, or as kv_quantization.py says.
KvDtype = Literal["auto", "int8"]
KV_DTYPES: tuple[KvDtype, ...] = ("auto", "int8")
_SCALE_BYTES = torch.float16.itemsize


def require_kv_dtype(name: str) -> KvDtype:
    """The name as a KvDtype; raises InvalidSetting for another one."""
    require_choice("kv_dtype", name, KV_DTYPES)
    return "int8" if name == "int8" else "auto"


@dataclass(frozen=True, slots=True)
class KVSize:
    """One layer's KV heads, and how many numbers a key and a value of each have."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Model dimensions that the KV cache depends on; `dtype` is the model's.

    num_kv_heads, head_dim: the most KV heads that a layer has, and the most numbers of a key or a
    value.
    layers: by default all attend to the whole prompt.
    states: each layer's, of one sequence; known once the model is loaded.
    in_parts: whether recurrent layers compute a prompt in parts as they do at once; likewise.
    own_sizes: each layer's, if they differ; full layers have the same.
    None of the four is sent: models of one fingerprint have the same.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: torch.dtype
    layers: tuple[Layer, ...] = field(default=(), compare=False)
    states: tuple[tuple[StatePart, ...], ...] = field(default=(), compare=False)
    in_parts: bool = field(default=True, compare=False)
    own_sizes: tuple[KVSize, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        layers = self.layers or (FULL,) * self.num_layers
        states = self.states or ((),) * self.num_layers
        assert len(layers) == len(states) == len(self.sizes) == self.num_layers
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "states", states)

    @property
    def largest(self) -> KVSize:
        """What pages are made for; smaller layers leave a part of theirs empty."""
        return KVSize(self.num_kv_heads, self.head_dim, self.head_dim)

    @property
    def sizes(self) -> tuple[KVSize, ...]:
        """Each layer's own."""
        return self.own_sizes or (self.largest,) * self.num_layers

    @property
    def first_smaller(self) -> int | None:
        """The first layer whose KV is smaller than the largest; None if all are alike."""
        found = (idx for idx in self.kv_layers if self.sizes[idx] != self.largest)
        return next(found, None)

    @property
    def total_kv_heads(self) -> int:
        """KV heads of all layers."""
        return sum(self.sizes[idx].num_kv_heads for idx in self.kv_layers)

    @property
    def groups(self) -> tuple[int, ...]:
        """Query heads per KV head, of the kinds of layers."""
        counts = {self.sizes[idx].num_kv_heads: None for idx in self.kv_layers}
        return tuple(self.num_heads // count for count in counts)

    @property
    def full_size(self) -> KVSize:
        """That of the full layers; the largest if there are none."""
        return self.sizes[self.full_layers[0]] if self.full_layers else self.largest

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """The layers that have keys and values."""
        return tuple(idx for idx, layer in enumerate(self.layers) if layer.has_kv)

    @property
    def has_states(self) -> bool:
        return any(layer.is_recurrent for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's states."""
        return sum(part.nbytes for parts in self.states for part in parts)

    def of_kv_layers(self) -> "ModelShape":
        """The shape of a model with those layers alone that have keys and values."""
        own = self.kv_layers
        return replace(
            self,
            num_layers=len(own),
            layers=tuple(self.layers[idx] for idx in own),
            states=(),
            own_sizes=tuple(self.own_sizes[idx] for idx in own) if self.own_sizes else (),
        )

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The layers that attend to the whole prompt, by which it is pruned."""
        return tuple(idx for idx, layer in enumerate(self.layers) if layer.is_full)

    @property
    def shortest_window(self) -> int | None:
        """The fewest tokens that a layer's window or chunk has; None without one."""
        return min(
            (layer.window for layer in self.layers if layer.window is not None), default=None
        )

    def nearest_full(self, layer_idx: int) -> int:
        """The full layer next to a layer, the earlier of two; itself if it is one."""
        return min(self.full_layers, key=lambda idx: abs(idx - layer_idx))

    def layer_name(self, layer_idx: int) -> str:
        """The number of a layer, and which of the full layers it is where not all are."""
        if len(self.full_layers) == self.num_layers or layer_idx not in self.full_layers:
            return str(layer_idx)
        place = self.place_among_full(layer_idx)
        return f"{layer_idx}, full layer {place} of {len(self.full_layers)}"

    def place_among_full(self, layer_idx: int) -> int:
        """Which of the full layers a full one is: 1 for the first."""
        return self.full_layers.index(layer_idx) + 1

    def part(self, num_kv_heads: int) -> "ModelShape":
        """The shape with so many of the KV heads, and their query heads; all layers are alike."""
        assert self.first_smaller is None
        group = self.num_heads // self.num_kv_heads
        return replace(self, num_heads=group * num_kv_heads, num_kv_heads=num_kv_heads)

    def unpruned_layer_entries(self, num_tokens: int) -> list[int]:
        """KV entries of each layer, all heads, that the token after `num_tokens` attends to."""
        return [
            size.num_kv_heads * layer.num_kept(num_tokens)
            for size, layer in zip(self.sizes, self.layers, strict=True)
        ]

    def unpruned_entries(self, num_tokens: int) -> int:
        """Those of all layers."""
        return sum(self.unpruned_layer_entries(num_tokens))

    def kv_bytes(self, num_entries: int, kv_dtype: KvDtype = "auto") -> int:
        """Bytes of keys and values that pages hold for `num_entries` entries of one KV head."""
        return self._bytes_of(self.largest, num_entries, kv_dtype)

    def sent_bytes(self, layer_entries: Iterable[int], kv_dtype: KvDtype = "auto") -> int:
        """Bytes of keys and values of so many entries of each layer, without what pads pages.

        layer_entries: of the first layers, or of all.
        """
        return sum(self.layer_bytes(layer_entries, kv_dtype))

    def layer_bytes(self, layer_entries: Iterable[int], kv_dtype: KvDtype = "auto") -> list[int]:
        """Those of each layer."""
        return [
            self._bytes_of(size, num_entries, kv_dtype)
            for size, num_entries in zip(self.sizes, layer_entries, strict=False)
        ]

    def _bytes_of(self, size: KVSize, num_entries: int, kv_dtype: KvDtype) -> int:
        numbers = size.key_dim + size.value_dim
        if kv_dtype == "int8":
            return num_entries * (numbers + 2 * _SCALE_BYTES)
        return num_entries * numbers * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class LayerKV:
    """The kept KV of one layer.

    keys, values: [num_entries, key_dim] and [num_entries, value_dim], keys after RoPE at their
    original positions.
    positions: [num_entries] int32, ascending within a head.
    head_lengths: entries per KV head; sums to num_entries.
    window_queries: [num_heads, window, key_dim], queries of the last prompt tokens after RoPE;
    decode seeds its query ring with them.  None of a layer that is not full.
    scales: [num_entries, 2] float16 of keys and of values, which are int8 then; None: they are of
    the model's dtype.
    states: each part's of the layer's state (layer_state.py), after the last token; none for a
    layer without.  A layer that has nothing but a state has no entries.
    """

    layer_idx: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    head_lengths: tuple[int, ...]
    window_queries: Tensor
    scales: Tensor | None = None
    states: tuple[Tensor, ...] = ()

    @property
    def num_entries(self) -> int:
        return int(self.keys.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, positions and states; window queries are not counted."""
        num_bytes = self.keys.nbytes + self.values.nbytes + self.positions.nbytes
        num_bytes += sum(state.nbytes for state in self.states)
        return int(num_bytes + (0 if self.scales is None else self.scales.nbytes))

    def to(self, device: str) -> "LayerKV":
        """The layer with its tensors on `device`; tensors already there are not copied."""
        return replace(
            self,
            keys=self.keys.to(device),
            values=self.values.to(device),
            positions=self.positions.to(device),
            window_queries=self.window_queries.to(device),
            scales=None if self.scales is None else self.scales.to(device),
            states=tuple(state.to(device) for state in self.states),
        )

    def quantized(self) -> "LayerKV":
        """The layer with int8 keys and values; itself if it has them."""
        if self.scales is not None:
            return self
        (keys, of_keys), (values, of_values) = quantize(self.keys), quantize(self.values)
        scales = torch.stack([of_keys, of_values], dim=-1)
        return replace(self, keys=keys, values=values, scales=scales)

    def padded(self, num_numbers: int) -> "LayerKV":
        """The layer with zeros at the ends of shorter keys and values; itself if none is."""
        keys, values = (padded(part, num_numbers) for part in (self.keys, self.values))
        if keys is self.keys and values is self.values:
            return self
        return replace(self, keys=keys, values=values)

    def cut(self, size: KVSize) -> "LayerKV":
        """The layer without what `padded` put there."""
        if (self.keys.shape[-1], self.values.shape[-1]) == (size.key_dim, size.value_dim):
            return self
        return replace(
            self,
            keys=self.keys[:, : size.key_dim].contiguous(),
            values=self.values[:, : size.value_dim].contiguous(),
        )

    def dequantized(self, dtype: torch.dtype) -> "LayerKV":
        """The layer with keys and values of the model's dtype; itself if it has them."""
        if self.scales is None:
            return self
        keys, values = (
            dequantize(levels, scales, dtype)
            for levels, scales in zip((self.keys, self.values), self.scales.T, strict=True)
        )
        return replace(self, keys=keys, values=values, scales=None)

    def newest(self, count: int) -> "LayerKV":
        """The layer with each head's last `count` entries at most; itself if it has no more."""
        if max(self.head_lengths) <= count:
            return self
        kept = [slice(max(own.start, own.stop - count), own.stop) for own in self.head_slices()]

        def of(part: Tensor) -> Tensor:
            return torch.cat([part[own] for own in kept])

        return replace(
            self,
            keys=of(self.keys),
            values=of(self.values),
            positions=of(self.positions),
            head_lengths=tuple(own.stop - own.start for own in kept),
            scales=None if self.scales is None else of(self.scales),
        )

    def head_slices(self) -> list[slice]:
        """The rows of each KV head in `keys`, `values` and `positions`."""
        ends = list(accumulate(self.head_lengths))
        return [slice(end - n, end) for end, n in zip(ends, self.head_lengths, strict=True)]


def pack_layer(
    layer_idx: int,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    kept: list[Tensor],
    window_queries: Tensor,
) -> LayerKV:
    """A LayerKV that owns copies of the kept entries.

    keys, values: [num_kv_heads, num_tokens, key_dim or value_dim]; positions: [num_tokens].
    kept: per KV head, ascending token indices [num_kept].
    """
    index = torch.cat(kept)
    head = torch.cat([torch.full_like(own, head_idx) for head_idx, own in enumerate(kept)])
    return LayerKV(
        layer_idx=layer_idx,
        keys=keys[head, index],
        values=values[head, index],
        positions=positions[index].to(torch.int32),
        head_lengths=tuple(len(k) for k in kept),
        window_queries=window_queries,
    )


def without_entries(shape: ModelShape, layer_idx: int, device: torch.device) -> LayerKV:
    """Of a layer that has no keys and values."""
    size = shape.sizes[layer_idx]
    nothing = torch.empty((0, size.key_dim), dtype=shape.dtype, device=device)
    return LayerKV(
        layer_idx=layer_idx,
        keys=nothing,
        values=nothing.new_empty((0, size.value_dim)),
        positions=torch.empty(0, dtype=torch.int32, device=device),
        head_lengths=(0,) * size.num_kv_heads,
        window_queries=nothing.expand(shape.num_heads, 0, size.key_dim),
    )


def stacked(keys: Tensor, values: Tensor) -> Tensor:
    """[2, ..., D] of keys [..., key_dim] and values [..., value_dim], the shorter with zeros."""
    most = max(keys.shape[-1], values.shape[-1])
    return torch.stack([padded(keys, most), padded(values, most)])


def padded(vectors: Tensor, num_numbers: int) -> Tensor:
    """Vectors of `num_numbers`: those of [..., D], with zeros after shorter ones."""
    missing = num_numbers - vectors.shape[-1]
    return F.pad(vectors, (0, missing)) if missing else vectors


def named_heads(heads: range) -> str:
    """Some KV heads, for messages."""
    return f"heads {heads.start} to {heads.stop - 1}"


@dataclass(frozen=True, slots=True)
class SequenceState:
    """State of a running sequence, besides its KV and its query window.

    next_position: of its next token, as in PrefillReport.
    recompressed_entries: of the whole request.  at_floor: the budget was lowered to decode_floor.
    """

    token_ids: tuple[int, ...]
    next_position: int
    recompressed_entries: int = 0
    at_floor: bool = False
