"""CPU kernel benchmark: attention and products beside PyTorch's, at the sizes of the 0.5B shape.

Ours and theirs run in turn, a layer's worth each; times are the best of the rounds. `of the
ceiling` is our rate as a share of what the same run measures: for many rows the rate of PyTorch's
product, for one row the memory bandwidth. Attention over pages has PyTorch's on keys and values
that already lie together.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.decode import read_bandwidth
from benchmarks.report import arguments, show, write_json
from benchmarks.shapes import HALF_BILLION
from winnow.kernels.cpu import attention
from winnow.kernels.cpu.library import library
from winnow.kernels.cpu.linear import Product, linear, pack

HEADS, KV_HEADS, HEAD_DIM = HALF_BILLION["num_attention_heads"], 2, 64
HIDDEN, INNER = HALF_BILLION["hidden_size"], HALF_BILLION["intermediate_size"]
LAYERS = 8  # more weights and entries than a cache holds
PAGE = 16

Case = tuple[str, Callable[[], object], Callable[[], object]]


def random(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.bfloat16)


def prefill_case(num_tokens: int) -> Case:
    heads = [HEADS, KV_HEADS, KV_HEADS]
    product = random(num_tokens, sum(heads), HEAD_DIM)
    query, key, value = (part.transpose(0, 1) for part in torch.split(product, heads, dim=1))
    positions = torch.arange(num_tokens)

    def theirs() -> Tensor:
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, enable_gqa=True
        )

    def ours() -> Tensor:
        return attention.attend(query, key, value, positions, HEAD_DIM**-0.5)

    return f"attention of {num_tokens:,} tokens", ours, theirs


def decode_case(batch: int, length: int) -> Case:
    width = -(-length // PAGE)
    num_pages = LAYERS * batch * KV_HEADS * width
    keys, values = random(2, num_pages, PAGE, HEAD_DIM)
    pages = torch.randperm(num_pages).view(LAYERS, batch, KV_HEADS, width)
    slots = pages[..., -1] * PAGE + (length - 1) % PAGE
    rows = torch.arange(batch)
    lengths = torch.full((batch, KV_HEADS), length, dtype=torch.int32)
    query = random(batch, HEADS, HEAD_DIM)
    new_keys, new_values = random(2, batch, KV_HEADS, HEAD_DIM)
    together = random(2, LAYERS, batch, KV_HEADS, length, HEAD_DIM)
    grouped = query.view(batch, KV_HEADS, -1, HEAD_DIM)

    def ours() -> None:
        for idx in range(LAYERS):
            entries = keys, values, slots[idx], pages[idx], rows, lengths, length
            attention.append_and_attend(query, new_keys, new_values, *entries, HEAD_DIM**-0.5)

    def theirs() -> None:
        for idx in range(LAYERS):
            F.scaled_dot_product_attention(grouped, *together[:, idx])

    return f"attention of {batch} to {length:,} entries", ours, theirs


def product_case(num_rows: int) -> Case:
    weights = [random(2 * INNER, HIDDEN) for _ in range(LAYERS)]
    products = [Product(pack(weight)) for weight in weights]
    inputs = random(num_rows, HIDDEN)

    def ours() -> None:
        for product in products:
            linear(inputs, product, 2 * INNER)

    def theirs() -> None:
        for weight in weights:
            F.linear(inputs, weight)

    return f"product of {num_rows:,} rows", ours, theirs


def best_seconds(calls: tuple[Callable[[], object], ...], rounds: int) -> list[float]:
    """Each call's best time; they take turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds + 1):
        for idx, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[idx] = min(best[idx], time.perf_counter() - start)
    return best


def compare(lengths: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    bandwidth = read_bandwidth()
    weight_numbers = LAYERS * 2 * INNER * HIDDEN
    _, ours, theirs = product_case(1024)
    product_rate = 2 * 1024 * weight_numbers / best_seconds((theirs,), rounds)[0]
    cases = [(prefill_case(n), 2 * HEADS * HEAD_DIM * n * n, product_rate) for n in lengths]
    for batch in (1, 8):
        kv_bytes = LAYERS * batch * KV_HEADS * 2048 * HEAD_DIM * 2 * 2
        cases.append((decode_case(batch, 2048), kv_bytes, bandwidth))
    cases += [(product_case(n), 2 * weight_numbers, bandwidth) for n in (1, 4)]
    cases.append((product_case(1024), 2 * 1024 * weight_numbers, product_rate))
    for (name, ours, theirs), work, ceiling in cases:
        own, other = best_seconds((ours, theirs), rounds)
        yield {
            "kernel": name,
            "ours ms": own * 1e3,
            "PyTorch ms": other * 1e3,
            "times faster": other / own,
            "of the ceiling": work / own / ceiling,
        }


@torch.inference_mode()
def main() -> None:
    options = arguments("CPU kernels beside PyTorch's operations.").parse_args()
    library()  # raises OSError if there is none
    rows = list(compare([2048] if options.quick else [2048, 8192], 3 if options.quick else 6))
    notes = [__doc__ or "", f"{torch.get_num_threads()} threads"]
    show("CPU kernels, bfloat16", rows, notes)
    write_json(options.json, "cpu_kernels", rows)


if __name__ == "__main__":
    main()
