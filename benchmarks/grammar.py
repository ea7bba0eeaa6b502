"""Grammar benchmark: a decode step whose answers keep to a JSON schema, against a free one.

Both engines run the same model, batch and context, and step in turn; the ratio is the median of the
pairs of steps. The schema has ten fields, in a list that does not end, so the masks are those of
strings, numbers, keys and what is between them. The model's weights are random: what it would say
does not matter, since temperature 1 and the grammar lead it everywhere. `compile` is a new grammar,
the vocabulary being read.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.decode import our_step
from benchmarks.report import arguments, show, write_json
from benchmarks.shapes import model_path
from winnow.decoder import DecoderModel
from winnow.grammar.compiler import GrammarCompiler
from winnow.grammar.constraint import CompiledGrammar
from winnow.grammar.source import schema_grammar
from winnow.models import load_model
from winnow.tokenizer import load_tokenizer

BATCH, VOCAB_SIZE = 8, 150_000
CONTEXT = 1024
KINDS: list[dict[str, Any]] = [
    {"type": "string", "maxLength": 40},
    {"type": "integer", "minimum": -500, "maximum": 500},
    {"type": "boolean"},
    {"enum": ["red", "green", "blue"]},
    {"type": "number"},
]
FIELDS = {f"field_{idx}": KINDS[idx % len(KINDS)] for idx in range(10)}
SCHEMA = {
    "type": "array",
    "items": {"type": "object", "properties": FIELDS, "required": [*FIELDS]},
    "minItems": 1000,
}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(model: DecoderModel, grammar: CompiledGrammar, steps: int) -> dict[str, Any]:
    free, kept = (
        our_step(model, BATCH, CONTEXT, steps + 2, grammar=own, temperature=1.0)
        for own in (None, grammar)
    )
    free(), kept()
    pairs = [(seconds(free), seconds(kept)) for _ in range(steps)]
    return {
        "batch": BATCH,
        "vocabulary": VOCAB_SIZE,
        "threads": torch.get_num_threads(),
        "free ms": 1e3 * median(one for one, _ in pairs),
        "with grammar ms": 1e3 * median(other for _, other in pairs),
        "ratio": median(other / one for one, other in pairs),
    }


def main() -> None:
    options = arguments("Steps with a grammar, against free ones.").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"vocab_size": VOCAB_SIZE, "eos_token_id": 0}
        path = model_path("0.5b", Path(folder), **sizes)
        model, tokenizer = load_model(path), load_tokenizer(path)
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, frozenset({0}))
    prepare_s = seconds(compiler.prepare)
    compile_s = seconds(lambda: compiler.compile(schema_grammar(SCHEMA)))
    row = compare(model, compiler.compile(schema_grammar(SCHEMA)), 10 if options.quick else 60)
    rows = [{"vocabulary s": prepare_s, "compile ms": 1e3 * compile_s} | row]
    show("Decode with a grammar", rows)
    write_json(options.json, "grammar", rows)
    compiler.close()


if __name__ == "__main__":
    main()
