"""The contents of all pages: keys, values and positions of entries, and queries.

A slot is the place of one entry: its page * page_size + its place in the page. page_table.py
says whose they are.
"""

from dataclasses import replace

import torch
from torch import Tensor

from winnow.attention import PagedEntries
from winnow.errors import InvalidSetting
from winnow.kernels.choice import scatter_for
from winnow.kv import KvDtype, LayerKV, ModelShape
from winnow.kv_quantization import dequantize, quantize
from winnow.side_stream import copier_to


class PageStorage:
    """Pages whose keys and values are of the model's dtype.

    parts: what an entry consists of, each [num_slots, ...]: key, value and position come first.
    vectors: the memory of all pages as queries see it: [num_vectors, D] of the model's dtype, the
    pages' keys first, then their values.
    """

    parts: tuple[Tensor, ...]

    def __init__(
        self, shape: ModelShape, num_pages: int, page_size: int, device: torch.device
    ) -> None:
        self.device = device
        self._dtype, self._head_dim = shape.dtype, shape.head_dim
        # Not initialized: the memory of a page is first touched when the page is allocated.
        size = (2, num_pages, page_size, shape.head_dim)
        self._pages = torch.empty(size, dtype=self._held_dtype(shape), device=device)
        self._slots = self._pages.flatten(1, 2)  # [2, num_slots, D]
        self.positions = torch.empty(num_pages * page_size, dtype=torch.int32, device=device)
        keys, values = self._slots
        self._entries = (keys, values, self.positions)
        self._scatter = scatter_for(self._entries)
        self._bring = copier_to(device)
        self.parts = self._entries
        self.vectors = self._pages.view(-1).view(shape.dtype).view(-1, shape.head_dim)

    def _held_dtype(self, shape: ModelShape) -> torch.dtype:
        return shape.dtype

    @property
    def vectors_per_page(self) -> int:
        """Queries that a page has room for, half of them in its keys, half in its values."""
        return len(self.vectors) // self._pages.shape[1]

    @property
    def paged(self) -> PagedEntries:
        """The pages as an attention kernel reads and writes them."""
        keys, values = self._pages
        return PagedEntries(keys, values, self.positions.view(keys.shape[:2]))

    def blank(self, pages: Tensor) -> None:
        """Prepare pages that will be partly filled.

        Attention reads whole pages and masks their ends, but masking does not remove a NaN that a
        failed request left there.
        """
        self._pages.index_fill_(1, pages, 0)

    def write(self, slots: Tensor, layer: LayerKV) -> None:
        """Copy a layer's entries to their slots [num_entries]."""
        keys, values, positions, *scales = self._parts_of(self._moved(layer))
        self._scatter((keys, values, positions), slots, self._entries)
        for part, own in zip(self.parts[3:], scales, strict=True):
            part.index_copy_(0, slots, own)

    def _moved(self, layer: LayerKV) -> LayerKV:
        """The layer on this device, but for its queries."""
        own = [layer.keys, layer.values, layer.positions]
        own += [] if layer.scales is None else [layer.scales]
        keys, values, positions, *scales = self._bring(own)
        return replace(
            layer,
            keys=keys,
            values=values,
            positions=positions,
            scales=scales[0] if scales else None,
        )

    def _parts_of(self, layer: LayerKV) -> tuple[Tensor, ...]:
        layer = layer.dequantized(self._dtype)
        return layer.keys, layer.values, layer.positions

    def read(
        self, slots: Tensor, layer_idx: int, head_lengths: tuple[int, ...], window_queries: Tensor
    ) -> LayerKV:
        """A copy of a layer's entries, which lie at `slots`, heads one after another."""
        keys, values, positions, *scales = (part.index_select(0, slots) for part in self.parts)
        return LayerKV(
            layer_idx=layer_idx,
            keys=keys,
            values=values,
            positions=positions,
            head_lengths=head_lengths,
            window_queries=window_queries,
            scales=scales[0] if scales else None,
        )

    def append(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write entries without their positions.  slots: [...]; keys, values: [..., D]."""
        self._slots[:, slots] = torch.stack([keys, values])

    def gather(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of pages [B, H_kv, P]: each [B, H_kv, P * page_size, D]."""
        keys, values = self._gathered(pages.flatten())
        shape = (*pages.shape[:2], -1, self._head_dim)
        return keys.view(shape), values.view(shape)

    def _gathered(self, pages: Tensor) -> Tensor:
        """Keys and values of pages [n]: [2, n, page_size, D]."""
        return self._pages.index_select(1, pages)


class Int8PageStorage(PageStorage):
    """Pages whose keys and values are int8 with scales (kv_quantization.py).

    Layers and entries of the model's dtype are quantized as they are written. Queries keep that
    dtype: fewer fit into a page.
    """

    def __init__(
        self, shape: ModelShape, num_pages: int, page_size: int, device: torch.device
    ) -> None:
        if page_size % shape.dtype.itemsize:
            raise InvalidSetting(
                f"page_size is {page_size}; with int8 KV it must be a multiple of "
                f"{shape.dtype.itemsize}, the bytes of a query's number",
                param="page_size",
            )
        super().__init__(shape, num_pages, page_size, device)
        size = (num_pages, page_size, 2)
        self._page_scales = torch.empty(size, dtype=torch.float16, device=device)
        self._scales = self._page_scales.flatten(0, 1)  # [num_slots, 2]
        self.parts = (*self.parts, self._scales)

    def _held_dtype(self, shape: ModelShape) -> torch.dtype:
        return torch.int8

    @property
    def paged(self) -> PagedEntries:
        return replace(super().paged, scales=self._page_scales)

    def blank(self, pages: Tensor) -> None:
        self._page_scales.index_fill_(0, pages, 0)  # no int8 is a NaN

    def _parts_of(self, layer: LayerKV) -> tuple[Tensor, ...]:
        layer = layer.quantized()
        assert layer.scales is not None
        return layer.keys, layer.values, layer.positions, layer.scales

    def append(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        levels, scales = quantize(torch.stack([keys, values]))
        self._slots[:, slots], self._scales[slots] = levels, scales.movedim(0, -1)

    def _gathered(self, pages: Tensor) -> Tensor:
        levels = self._pages.index_select(1, pages)
        scales = self._page_scales.index_select(0, pages).movedim(-1, 0)
        return dequantize(levels, scales, self._dtype)


STORAGES: dict[KvDtype, type[PageStorage]] = {"auto": PageStorage, "int8": Int8PageStorage}
