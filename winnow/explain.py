"""Explains the pruning of one prompt: what each layer kept, and how it ranked the tokens."""

import codecs
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from winnow.batch import BatchJob
from winnow.completion import Completion
from winnow.engine.prefill import PrefillRun
from winnow.local import Winnow
from winnow.methods.base import Cut, LayerView
from winnow.pruning_settings import PruningSettings
from winnow.report import PrefillReport
from winnow.sampling_params import SamplingParams
from winnow.selection import token_scores
from winnow.tokenizer import Tokenizer

FULL = PruningSettings(method="full")
TIMED_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class LayerScores:
    """Ranks of the prompt's tokens at one layer, 1 for the best; 0 for tokens not ranked.

    Tokens are ranked by the pooled attention they receive from the window. Tokens of the window and
    tokens dropped earlier are not ranked.
    """

    layer_idx: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """One prompt under one method.

    pieces: the text of each token; joined they are the prompt. A token that ends inside a character
    is empty; the token that completes it has the whole character.
    last_layers: per token, the last layer that computed it (in pass one if there are two).
    layer_scores: of the layers that computed every token, in order; none if all are in the window.
    prefill_s, full_prefill_s: seconds with and without pruning, medians of alternating rounds.
    """

    pieces: tuple[str, ...]
    settings: PruningSettings
    report: PrefillReport
    last_layers: tuple[int, ...]
    layer_scores: tuple[LayerScores, ...]
    num_kv_heads: int
    answer: Completion
    full_answer: Completion
    prefill_s: float
    full_prefill_s: float


def explain(winnow: Winnow, token_ids: Sequence[int], sampling: SamplingParams) -> Explanation:
    """Run a prompt with the pruning of `winnow` and without.

    Raises as `Winnow.generate`.
    """
    settings = winnow.pruning
    winnow.require_fits(len(token_ids), FULL, sampling)
    observer = _Observer(settings, len(token_ids), winnow.model.shape.num_layers)
    report = _prefill(winnow, token_ids, settings, observer)
    prefill_s, full_prefill_s = _times(winnow, token_ids, settings)
    jobs = [BatchJob(token_ids, pruning, sampling) for pruning in (settings, FULL)]
    answers = {result.job_idx: result.completion for result in winnow.generate_many(jobs)}
    return Explanation(
        pieces=tuple(_pieces(winnow.tokenizer, token_ids)),
        settings=settings,
        report=report,
        last_layers=tuple(observer.last_layers),
        layer_scores=tuple(observer.layer_scores),
        num_kv_heads=winnow.model.shape.num_kv_heads,
        answer=answers[0],
        full_answer=answers[1],
        prefill_s=prefill_s,
        full_prefill_s=full_prefill_s,
    )


class _Observer:
    """Records, during prefill, the rank of each token and the layer that drops it."""

    def __init__(self, settings: PruningSettings, num_tokens: int, num_layers: int) -> None:
        self._settings = settings
        self._num_tokens = num_tokens
        self._going_on = torch.arange(num_tokens)
        self.last_layers = [num_layers - 1] * num_tokens
        self.layer_scores: list[LayerScores] = []

    def __call__(self, view: LayerView, cut: Cut | None) -> None:
        if view.num_tokens == self._num_tokens and view.num_tokens > self._settings.window_size:
            self.layer_scores.append(LayerScores(view.layer_idx, self._ranks(view)))
        if cut is None:
            return
        kept = cut.kept.cpu()
        dropped = torch.ones(len(self._going_on), dtype=torch.bool)
        dropped[kept] = False
        for token in self._going_on[dropped].tolist():
            self.last_layers[token] = view.layer_idx
        self._going_on = self._going_on[kept]

    def _ranks(self, view: LayerView) -> tuple[int, ...]:
        scores = token_scores(view.window_mass, self._settings)
        order = scores.argsort(descending=True, stable=True).tolist()
        ranks = [0] * self._num_tokens
        for rank, token in enumerate(order, start=1):
            ranks[token] = rank
        return tuple(ranks)


def _prefill(
    winnow: Winnow,
    token_ids: Sequence[int],
    settings: PruningSettings,
    observer: _Observer | None = None,
) -> PrefillReport:
    run = PrefillRun(winnow.model, token_ids, settings, observer)
    while not run.finished:
        run.compute_layer()
    return run.result().report


def _times(
    winnow: Winnow, token_ids: Sequence[int], settings: PruningSettings
) -> tuple[float, float]:
    """Median seconds of prefill with `settings` and without pruning, in alternating rounds."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(TIMED_ROUNDS):
        for is_full in (True, False):
            started_s = time.perf_counter()
            _prefill(winnow, token_ids, FULL if is_full else settings)
            if winnow.model.device.type == "cuda":
                torch.cuda.synchronize(winnow.model.device)
            seconds[is_full].append(time.perf_counter() - started_s)
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def _pieces(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces = [decoder.decode(tokenizer.token_bytes(token_id)) for token_id in token_ids]
    pieces[-1] += decoder.decode(b"", final=True)
    return pieces
