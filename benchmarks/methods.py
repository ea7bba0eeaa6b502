"""Prefill time of pruning methods on one model, side by side.

Every round computes one prompt of prose with each method in turn, in this process; the figure is
the median of the rounds' ratios to `full`. The floor is the share of layer-tokens that a method
computes: attention shrinks faster than that, so a method can be below it.
"""

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import arguments, show, write_json
from benchmarks.shapes import REAL_MODEL
from evals.prose import documentation_sentences
from evals.variants import UNPRUNED, Variant, make_variants, parse_methods
from winnow.decoder import DecoderModel
from winnow.defaults import override, pruning_defaults
from winnow.engine.prefill import PrefillRun
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings
from winnow.report import PrefillReport
from winnow.tokenizer import load_tokenizer

_METHODS = "full,snapkv,fastkv,asl,gemfilter,pyramidinfer"


def prompt_of(model: DecoderModel, num_tokens: int) -> list[int]:
    """Token ids [num_tokens] of prose."""
    sentences = islice(documentation_sentences(), num_tokens)
    return load_tokenizer(model.description.path).encode(" ".join(sentences))[:num_tokens]


def prefill(
    model: DecoderModel, token_ids: Sequence[int], settings: PruningSettings
) -> tuple[float, PrefillReport]:
    """Seconds, and the report."""
    start_s = time.perf_counter()
    run = PrefillRun(model, token_ids, settings, is_long=model.description.is_long(len(token_ids)))
    while not run.finished:
        run.compute_layer()
    result = run.result()
    model.logits(result.final_hidden[None])
    return time.perf_counter() - start_s, result.report


def compare(
    model: DecoderModel, variants: Sequence[Variant], num_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """One row per variant."""
    token_ids = prompt_of(model, num_tokens)
    base = pruning_defaults(model.description)
    seconds: dict[str, list[float]] = {str(variant): [] for variant in variants}
    reports: dict[str, PrefillReport] = {}
    prefill(model, token_ids[:256], override(base, variants[0].changes))  # touches every weight
    for _ in range(rounds):
        for variant in variants:
            settings = override(base, variant.changes)
            taken_s, reports[str(variant)] = prefill(model, token_ids, settings)
            seconds[str(variant)].append(taken_s)
    return [
        {
            "method": name,
            "seconds": median(taken_s),
            "of full": median(a / b for a, b in zip(taken_s, seconds[UNPRUNED], strict=True)),
            "floor": reports[name].computed_share,
            "KV kept": reports[name].kv_bytes_kept / reports[name].kv_bytes_full,
        }
        for name, taken_s in seconds.items()
    ]


def main() -> None:
    parser = arguments("Prefill time of pruning methods on one model.")
    parser.add_argument("--model", type=Path, default=REAL_MODEL)
    parser.add_argument("--methods", default=_METHODS, help="as of `winnow eval`")
    parser.add_argument("--length", type=int, default=4096, help="tokens (default: 4096)")
    parser.add_argument("--budget", type=int, help="tokens (default: a quarter of the prompt)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    options = parser.parse_args()
    wanted = tuple(spec for spec in parse_methods(options.methods) if spec.method != UNPRUNED)
    specs = (*parse_methods(UNPRUNED), *wanted)
    variants = make_variants(specs, [options.budget or options.length // 4])
    model = load_model(options.model)
    rounds = 1 if options.quick else options.rounds
    rows = compare(model, variants, options.length, rounds)
    show(f"Prefill of {options.length:,} tokens, {options.model.name}", rows, [__doc__ or ""])
    write_json(options.json, "methods", rows)


if __name__ == "__main__":
    main()
