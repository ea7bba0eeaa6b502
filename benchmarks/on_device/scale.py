"""Sizes: the shape of an 8B model for a GPU, or all small enough for a test."""

from dataclasses import dataclass
from typing import Any

# The sizes of Llama-3.1-8B.
EIGHT_BILLION: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": False,
}
TINY: dict[str, Any] = EIGHT_BILLION | {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True, slots=True)
class Scale:
    """model: sizes of the random Llama that is made.  batches: of decode, ascending.

    copy_bytes: that a copy reads and writes.  calls: of a kernel in one timing.
    entries: KV entries per head, of kernels and steps.
    lengths, page_sizes, blocks, warps: of the attention section.
    wide_entries: that heads have room for in a table with one long row.
    layer_bytes: KV that attention reads in turn, so that none of it is in the device's cache.
    prompts: tokens.  steps, rounds: steps in a timing, and timings.
    replays: steps in which recorded ones are compared with launched ones.
    recompress_interval: entries above `entries` at which these are cut back.
    """

    model: dict[str, Any]
    batches: tuple[int, ...]
    copy_bytes: int
    calls: int
    entries: int
    lengths: tuple[int, ...]
    wide_entries: int
    page_sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    warps: tuple[int, ...]
    layer_bytes: int
    prompts: tuple[int, ...]
    steps: int
    rounds: int
    replays: int
    recompress_interval: int


FULL = Scale(
    model=EIGHT_BILLION,
    batches=(1, 8, 32),
    copy_bytes=2 << 30,
    calls=20,
    entries=2048,
    lengths=(512, 2048, 8192),
    wide_entries=65_536,
    page_sizes=(16, 64),
    blocks=(32, 64, 128),
    warps=(2, 4, 8),
    layer_bytes=512 << 20,
    prompts=(8192, 32_768),
    steps=30,
    rounds=3,
    replays=1000,
    recompress_interval=128,
)
QUICK = Scale(
    model=TINY,
    batches=(1, 8),
    copy_bytes=1 << 20,
    calls=2,
    entries=64,
    lengths=(64,),
    wide_entries=1024,
    page_sizes=(16,),
    blocks=(64,),
    warps=(4,),
    layer_bytes=1 << 20,
    prompts=(256,),
    steps=2,
    rounds=1,
    replays=8,
    recompress_interval=4,
)
