"""The explanation of one prompt whose run has finished."""

from collections.abc import Iterator

from services.gateway.request.generate_call import PromptRequest
from services.gateway.served_model import ServedModel
from services.gateway.usage import Explanation, RunStats, Span
from winnow.token_scores import TokenScores


def explain(
    request: PromptRequest, stats: RunStats, model: ServedModel, num_generated: int
) -> Explanation | None:
    """None if prefill did not report the scores.  Slow for a long prompt.

    num_generated: tokens of all its answers.
    """
    report, scores = stats.report, stats.scores
    if report is None or scores is None:
        return None
    shape = model.description.shape
    return Explanation(
        pieces=tuple(model.tokenizer.pieces(request.token_ids)),
        layer=scores.layer_idx,
        scores=_rounded(scores),
        last_layers=tuple(scores.last_layers.tolist()),
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        window_size=request.pruning.window_size,
        layer_entries=report.layer_entries,
        layer_entries_full=tuple(shape.unpruned_layer_entries(report.num_prompt_tokens)),
        layer_bytes=tuple(shape.layer_bytes(report.layer_entries)),
        threshold=request.pruning.threshold,
        timeline=tuple(_timeline(stats)),
        tokens_per_s=_tokens_per_s(stats, num_generated - request.num_sequences),
    )


def _rounded(scores: TokenScores) -> tuple[float | None, ...]:
    """By token, with three significant digits; None for the window's."""
    unscored = len(scores.last_layers) - len(scores.scores)
    return (*(float(f"{score:.3g}") for score in scores.scores.tolist()), *[None] * unscored)


def _timeline(stats: RunStats) -> Iterator[Span]:
    """From the durations that prefill reports; of several attempts the last one's."""
    yield Span("admission", 0.0, stats.admission_s)
    first_s, timings, sent_s = stats.ttft_s, stats.timings, stats.admission_s
    if timings is not None:
        begun_s = stats.admission_s + timings.queue_s
        computed_s = begun_s + timings.compute_s
        sent_s = computed_s + timings.exposed_transfer_s
        yield Span("queue", stats.admission_s, begun_s)
        yield Span("prefill", begun_s, computed_s)
        yield Span("transfer", max(begun_s, sent_s - timings.transfer_s), sent_s)
    if first_s is not None and stats.last_token_s is not None:
        yield Span("first token", min(sent_s, first_s), first_s)
        yield Span("decode", first_s, stats.last_token_s)


def _tokens_per_s(stats: RunStats, num_later: int) -> float:
    """num_later: tokens after the first of each answer."""
    if stats.ttft_s is None or stats.last_token_s is None or num_later <= 0:
        return 0.0
    return num_later / max(1e-6, stats.last_token_s - stats.ttft_s)
