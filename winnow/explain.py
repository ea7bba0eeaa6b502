"""Explains the pruning of one prompt: what each layer kept, and how it ranked the tokens."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from winnow.adapters.slots import LoadedAdapter
from winnow.batch import BatchJob
from winnow.completion import Completion
from winnow.engine.prefill import PrefillRun, Watch
from winnow.engine.score_watch import ScoreWatch
from winnow.local import Winnow
from winnow.methods.base import Cut, LayerView
from winnow.pruning_settings import PruningSettings
from winnow.report import PrefillReport
from winnow.sampling_params import SamplingParams
from winnow.selection import token_scores
from winnow.token_scores import TokenScores

FULL = PruningSettings(method="full")
TIMED_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class LayerRanks:
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
    scores: at the layer that selected, or the last one.
    layer_entries_full: KV entries of each layer without pruning, summed over KV heads.
    layer_bytes: of what each layer kept, in the model's dtype.
    layer_ranks: of the full layers that computed every token, in order; none if all are in the
    window.
    selection_full_layer: which of the full layers selected, from 1.
    prefill_s, full_prefill_s: seconds with and without pruning, medians of alternating rounds.
    """

    pieces: tuple[str, ...]
    settings: PruningSettings
    report: PrefillReport
    scores: TokenScores
    layer_ranks: tuple[LayerRanks, ...]
    num_kv_heads: int
    layer_entries_full: tuple[int, ...]
    layer_bytes: tuple[int, ...]
    selection_full_layer: int | None
    answer: Completion
    full_answer: Completion
    prefill_s: float
    full_prefill_s: float


def explain(
    winnow: Winnow,
    token_ids: Sequence[int],
    sampling: SamplingParams,
    adapter: str | None = None,
) -> Explanation:
    """Run a prompt with the pruning of `winnow` and without.

    adapter: the name of the one that answers; None: the model alone does.
    Raises as `Winnow.generate`.
    """
    settings = winnow.pruning
    used = None if adapter is None else winnow.adapter(adapter)
    winnow.require_fits(len(token_ids), FULL, sampling)
    scores = ScoreWatch(settings, len(token_ids), winnow.model.shape)
    ranks = _RankWatch(settings, len(token_ids))

    def watch(view: LayerView, cut: Cut | None) -> None:
        ranks(view)
        scores(view, cut)

    is_long = winnow.model.description.is_long(len(token_ids) + sampling.max_tokens)
    report = _prefill(winnow, token_ids, settings, is_long, used, watch)
    prefill_s, full_prefill_s = _times(winnow, token_ids, settings, is_long, used)
    shape, layer = winnow.model.shape, report.selection_layer
    jobs = [BatchJob(token_ids, one, sampling, adapter=used) for one in (settings, FULL)]
    answers = {result.job_idx: result.completion for result in winnow.generate_many(jobs)}
    return Explanation(
        pieces=tuple(winnow.tokenizer.pieces(token_ids)),
        settings=settings,
        report=report,
        scores=scores.result(),
        layer_ranks=tuple(ranks.layers),
        num_kv_heads=shape.num_kv_heads,
        layer_entries_full=tuple(shape.unpruned_layer_entries(len(token_ids))),
        layer_bytes=tuple(shape.layer_bytes(report.layer_entries)),
        selection_full_layer=None if layer is None else shape.place_among_full(layer),
        answer=answers[0],
        full_answer=answers[1],
        prefill_s=prefill_s,
        full_prefill_s=full_prefill_s,
    )


class _RankWatch:
    """Records the ranks of each layer that computes every token."""

    def __init__(self, settings: PruningSettings, num_tokens: int) -> None:
        self._settings = settings
        self._num_tokens = num_tokens
        self.layers: list[LayerRanks] = []

    def __call__(self, view: LayerView) -> None:
        if view.num_tokens == self._num_tokens > self._settings.window_size:
            self.layers.append(LayerRanks(view.layer_idx, self._ranks(view)))

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
    is_long: bool,
    adapter: LoadedAdapter | None,
    watch: Watch | None = None,
) -> PrefillReport:
    run = PrefillRun(winnow.model, token_ids, settings, watch, is_long=is_long, adapter=adapter)
    while not run.finished:
        run.compute_layer()
    return run.result().report


def _times(
    winnow: Winnow,
    token_ids: Sequence[int],
    settings: PruningSettings,
    is_long: bool,
    adapter: LoadedAdapter | None,
) -> tuple[float, float]:
    """Median seconds of prefill with `settings` and without pruning, in alternating rounds."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(TIMED_ROUNDS):
        for is_full in (True, False):
            started_s = time.perf_counter()
            _prefill(winnow, token_ids, FULL if is_full else settings, is_long, adapter)
            if winnow.model.device.type == "cuda":
                torch.cuda.synchronize(winnow.model.device)
            seconds[is_full].append(time.perf_counter() - started_s)
    return statistics.median(seconds[False]), statistics.median(seconds[True])
