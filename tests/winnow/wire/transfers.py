"""Transfers made in code: small shapes, ragged heads, the frames of a whole transfer."""

from collections.abc import Sequence

import torch

from winnow.kv import KvDtype, LayerKV, ModelShape
from winnow.report import PrefillReport
from winnow.wire import WIRE_VERSIONS, Expected, Grant, Header, TransferEncoder

SHAPE = ModelShape(
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=32, dtype=torch.float32
)
NUM_PROMPT_TOKENS = 40
GRANT = Grant.issue(WIRE_VERSIONS)
REPORT = PrefillReport(
    num_prompt_tokens=NUM_PROMPT_TOKENS,
    num_selected_tokens=20,
    next_position=20,
    selection_layer=1,
    no_selection_reason=None,
    rho=((0, 1.0), (1, 0.25)),
    computed_share=0.75,
    kv_bytes_full=5120,
    kv_bytes_kept=1024,
    layer_entries=(12, 9),
    num_cached_tokens=16,
    num_recomputed_tokens=5,
    saved_layer_tokens=27,
    no_prefix_reason=None,
)


def make_layer(
    shape: ModelShape, layer_idx: int, head_lengths: Sequence[int], window: int = 3
) -> LayerKV:
    """Random tensors; ascending positions within NUM_PROMPT_TOKENS."""
    generator = torch.Generator().manual_seed(layer_idx)
    num_entries, size = sum(head_lengths), shape.sizes[layer_idx]

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(shape.dtype)

    positions = [
        torch.randperm(NUM_PROMPT_TOKENS, generator=generator)[:n].sort().values
        for n in head_lengths
    ]
    return LayerKV(
        layer_idx=layer_idx,
        keys=random(num_entries, size.key_dim),
        values=random(num_entries, size.value_dim),
        positions=torch.cat(positions).to(torch.int32),
        head_lengths=tuple(head_lengths),
        window_queries=random(shape.num_heads, window, size.key_dim),
    )


def make_layers(shape: ModelShape = SHAPE) -> list[LayerKV]:
    return [make_layer(shape, idx, (5 + idx, 7)) for idx in range(shape.num_layers)]


def expected(shape: ModelShape = SHAPE) -> Expected:
    return Expected(
        GRANT, "abc", shape, NUM_PROMPT_TOKENS, max_entries=NUM_PROMPT_TOKENS, max_window=8
    )


def encode(
    layers: Sequence[LayerKV],
    final_hidden: torch.Tensor,
    shape: ModelShape = SHAPE,
    *,
    frame_bytes: int = 256,
    report: PrefillReport = REPORT,
    kv_dtype: KvDtype = "auto",
    heads: range | None = None,
) -> list[bytes]:
    """Every frame of the transfer, in order."""
    ticket = GRANT.ticket(1)
    header = Header(
        "request-1", 1, ticket, "abc", shape, NUM_PROMPT_TOKENS, kv_dtype=kv_dtype, heads=heads
    )
    encoder = TransferEncoder(header, frame_bytes=frame_bytes)
    frames = [encoder.header()]
    for layer in layers:
        frames += encoder.layer(layer)
    return [*frames, encoder.trailer(final_hidden, report)]
