"""Sampling benchmark: the next token of 16 rows over a vocabulary of 150,000.

`batch` is one call for all rows, with the read at its end, as a decode step makes it. `row by row`
is how Winnow sampled before: each row in float64, a stable sort of the vocabulary for top-k and
top-p, inverse transform of one uniform number. `calls` is the batch's sampler called for each row.
All three run in turn in every round; the result is the best of the rounds. The floor is the time to
read the logits once from memory; logits that are still in a CPU's cache can be read faster.
"""

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import read_bandwidth
from benchmarks.report import arguments, show, write_json
from winnow.sampling import SamplingState, sample_batch
from winnow.sampling_params import SamplingParams

BATCH, VOCAB_SIZE = 16, 150_000
PROMPT, GENERATED = tuple(range(0, 3000, 3)), tuple(range(500))
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": dict.fromkeys(range(10), 1.0),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 0.7": {"temperature": 0.7},
    "min-p 0.05": {"min_p": 0.05},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "all filters and penalties": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    | PENALTIES,
    "greedy, top 20 log-probabilities": {"temperature": 0, "num_logprobs": 20},
    "temperature 0.7, top 20": {"temperature": 0.7, "num_logprobs": 20},
}


def row_by_row(logits: Tensor, params: SamplingParams) -> None:
    for row in logits:
        if not bool(row.isfinite().all()):
            raise ValueError("logits are not finite")
        token = _one_row(_penalized(row.to(torch.float64, copy=True), params), params)
        if params.num_logprobs is not None:
            logprobs = row.log_softmax(-1)
            top = logprobs.topk(params.num_logprobs)
            _ = float(logprobs[token]), top.indices.tolist(), top.values.tolist()


def _one_row(logits: Tensor, params: SamplingParams) -> int:
    if params.temperature == 0:
        return int(logits.argmax())
    shares = ((logits - logits.max()) / params.temperature).softmax(-1)
    if params.min_p > 0:
        shares = shares.where(shares >= shares.max() * params.min_p, 0)
    if params.top_k or params.top_p < 1:
        ordered, order = shares.sort(descending=True, stable=True)
        if params.top_k:
            ordered[params.top_k :] = 0
        if params.top_p < 1:
            ordered[ordered.cumsum(-1) - ordered >= params.top_p * ordered.sum()] = 0
        shares = torch.zeros_like(shares).scatter_(0, order, ordered)
    cumulative = shares.cumsum(-1)
    target = cumulative[-1] * random.random()
    return int(torch.searchsorted(cumulative, target, right=True))


def _penalized(logits: Tensor, params: SamplingParams) -> Tensor:
    if params.repetition_penalty != 1:
        seen = torch.tensor([*{*PROMPT, *GENERATED}])
        values, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        tokens, counts = torch.unique(torch.tensor(GENERATED), return_counts=True)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts.double()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    return logits


def sequence(params: SamplingParams) -> SamplingState:
    state = SamplingState(params, 0, len(PROMPT), PROMPT if params.needs_prompt else ())
    state.extend(GENERATED)
    return state


def best_ms(contestants: list[Callable[[], object]], rounds: int) -> list[float]:
    """The best time of each, in milliseconds; all run in turn in each round."""
    seconds = [[_seconds(run) for run in contestants] for _ in range(rounds + 1)]
    return [1e3 * min(times) for times in zip(*seconds[1:], strict=True)]


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def one_by_one(logits: Tensor, states: list[SamplingState]) -> None:
    for row, state in enumerate(states):
        sample_batch(logits[row : row + 1], [state]).read()


def times_ms(logits: Tensor, params: SamplingParams, rounds: int) -> list[float]:
    """Times of row_by_row, one_by_one and the batch."""
    states = [sequence(params) for _ in logits]
    return best_ms(
        [
            lambda: row_by_row(logits, params),
            lambda: one_by_one(logits, states),
            lambda: sample_batch(logits, states).read(),
        ],
        rounds,
    )


def compare(logits: Tensor, rounds: int) -> Iterator[dict[str, Any]]:
    floor_ms = 1e3 * logits.nbytes / read_bandwidth()
    for name, changes in SETTINGS.items():
        old, alone, batch = times_ms(logits, SamplingParams(**changes), rounds)
        yield {
            "setting": name,
            "threads": torch.get_num_threads(),
            "row by row ms": old,
            "calls ms": alone,
            "batch ms": batch,
            "times faster": old / batch,
            "floor ms": floor_ms,
        }


def main() -> None:
    options = arguments("Sampling for a batch, against row by row.").parse_args()
    rounds = 3 if options.quick else 10
    logits = 3 * torch.randn(BATCH, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows += compare(logits, rounds)
    show("Sampling", rows, [__doc__ or ""])
    write_json(options.json, "sampling", rows)


if __name__ == "__main__":
    main()
