"""Decode benchmark: tokens per second by batch size and context length, against transformers.

Each row runs the engine on `batch` sequences whose KV caches hold `context` entries per KV head
(random values: the work does not depend on them). The floor of a step is the time to read the
weights once and every sequence's keys and values once, at the memory bandwidth measured in the
same run. `transformers` is its forward pass on a batch of equal lengths with a DynamicCache.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.report import arguments, show, write_json
from benchmarks.shapes import model_path
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.graph import Recorder
from winnow.engine.kv_pool import KVPoolConfig
from winnow.engine.outputs import StepOutput
from winnow.kv import KvDtype, LayerKV, ModelShape
from winnow.pruning_settings import Recompression
from winnow.sampling_params import SamplingParams

if TYPE_CHECKING:
    from winnow.grammar.constraint import CompiledGrammar  # loads llguidance and transformers

ROUNDS = 3


def random_layers(model: DecoderModel, context: int, num_queries: int) -> Iterator[LayerKV]:
    shape = model.shape
    num_entries = context * shape.num_kv_heads
    for layer_idx in range(shape.num_layers):
        with model.device:
            yield LayerKV(
                layer_idx=layer_idx,
                keys=torch.randn(num_entries, shape.head_dim, dtype=shape.dtype),
                values=torch.randn(num_entries, shape.head_dim, dtype=shape.dtype),
                positions=torch.arange(context, dtype=torch.int32).repeat(shape.num_kv_heads),
                head_lengths=(context,) * shape.num_kv_heads,
                window_queries=torch.randn(
                    shape.num_heads, num_queries, shape.head_dim, dtype=shape.dtype
                ),
            )


def our_step(
    model: DecoderModel,
    batch: int,
    context: int,
    steps: int,
    recompression: Recompression = Recompression(),  # noqa: B008 - frozen
    kv_dtype: KvDtype = "auto",
    new_recorder: Callable[[], Recorder] | None = None,
    grammar: "CompiledGrammar | None" = None,
    temperature: float = 0,
    prompts: Sequence[Iterable[LayerKV]] = (),
) -> Callable[[], list[StepOutput]]:
    """An engine with `batch` running sequences; each call is one step.

    prompts: the layers of each sequence, of `context` entries per head; random ones without.
    """
    pool_config = _pool_for(model.shape, batch, context + steps, kv_dtype)
    engine = DecodeEngine(
        model, pool_config=pool_config, max_batch_size=batch, new_recorder=new_recorder
    )
    sampling = SamplingParams(
        max_tokens=steps + 2, temperature=temperature, ignore_eos=grammar is None
    )
    window = recompression.window_size if recompression.observes else 0
    for idx in range(batch):
        request = GenerationSpec(
            str(idx),
            context,
            context,
            replace(sampling, seed=idx),
            recompression=recompression,
            grammar=grammar,
        )
        reservation = engine.reserve(request)
        for layer in prompts[idx] if prompts else random_layers(model, context, window):
            reservation.write_layer(layer)
        engine.start(reservation, torch.randn(model.shape.hidden_size), context)
    engine.step()  # the first token comes from prefill's hidden state
    return engine.step


def _pool_for(shape: ModelShape, batch: int, entries: int, kv_dtype: KvDtype) -> KVPoolConfig:
    """Room for every sequence, its last queries and the ends of pages included."""
    num_entries = batch * shape.num_layers * shape.num_kv_heads * (entries + 64)
    memory_bytes = shape.kv_bytes(num_entries, kv_dtype) * 5 // 4 + (64 << 20)
    return KVPoolConfig(memory_bytes, kv_dtype=kv_dtype)


def their_step(path: Path, shape: ModelShape, batch: int, context: int) -> Callable[[], object]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)  # in eval mode
    cache = DynamicCache(config=model.config)
    size = (batch, shape.num_kv_heads, context, shape.head_dim)
    for layer_idx in range(shape.num_layers):
        layer = (torch.randn(size, dtype=shape.dtype), torch.randn(size, dtype=shape.dtype))
        cache.update(*layer, layer_idx)

    @torch.inference_mode()
    def step() -> object:
        tokens = torch.zeros(batch, 1, dtype=torch.int64)
        return model(tokens, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)

    return step


def seconds_per_step(step: Callable[[], object], steps: int) -> float:
    """Mean time of a step, as the median over ROUNDS rounds."""
    step()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        rounds.append((time.perf_counter() - start) / steps)
    return median(rounds)


def read_bandwidth() -> float:
    """Memory read bandwidth in bytes per second, using all threads."""
    block = torch.ones(1 << 28, dtype=torch.float32)  # 1 GiB
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - start)
    return block.nbytes / min(seconds)


def compare(
    name: str, path: Path, batches: list[int], contexts: list[int], steps: int
) -> Iterator[dict[str, Any]]:
    from winnow.models import load_model  # noqa: PLC0415 - benchmarks.gpu runs without its imports

    bandwidth = read_bandwidth()
    model = load_model(path, dtype="bfloat16")
    shape = model.shape
    weight_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    for context in contexts:
        alone = 0.0
        for batch in batches:
            ours = seconds_per_step(our_step(model, batch, context, ROUNDS * steps + 1), steps)
            theirs = seconds_per_step(their_step(path, shape, batch, context), steps)
            alone = alone or 1 / ours
            kv_bytes = shape.kv_bytes(batch * context * shape.num_layers * shape.num_kv_heads)
            yield {
                "model": name,
                "context": context,
                "batch": batch,
                "tokens/s": batch / ours,
                "of batch 1": batch / ours / alone,
                "step ms": ours * 1e3,
                "floor ms": (weight_bytes + kv_bytes) / bandwidth * 1e3,
                "transformers tokens/s": batch / theirs,
                "of transformers": theirs / ours,
            }


def main() -> None:
    options = arguments("Decode throughput against batch and context.").parse_args()
    batches, steps = ([1, 8], 4) if options.quick else ([1, 2, 4, 8, 16], 8)
    contexts = [512] if options.quick else [512, 2048]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("0.5b", "tiny"):
            rows += compare(name, model_path(name, Path(folder)), batches, contexts, steps)
    show("Decode, bfloat16", rows, [__doc__ or ""])
    write_json(options.json, "decode", rows)


if __name__ == "__main__":
    main()
