"""Usage of a request: token counts, and what was done to its prompts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from services.common.jobs import PrefillTimings
from winnow.kv import ModelShape
from winnow.report import PrefillReport
from winnow.token_scores import TokenScores
from winnow.tokens import FinishReason, TokenLogprobs

_UNTOLD = PrefillTimings(0.0, 0.0, 0.0, 0.0, 0)


@dataclass(slots=True)
class RunStats:
    """Statistics of one prompt's run so far.

    attempts: prefills. migrations: times another decode worker got its KV from a new prefill.
    moves: times another one fetched its KV.
    ttft_s, last_token_s, seconds: arrival until the first token, the last one, and the end.
    timings: None if the prefill worker delivered the KV but did not report.
    first_logprobs: of the first token, if requested.
    scores: of the prompt's tokens, if requested; None too if prefill did not report them.
    admission_s: arrival until KV memory was reserved.
    """

    attempts: int = 0
    migrations: int = 0
    moves: int = 0
    ttft_s: float | None = None
    last_token_s: float | None = None
    seconds: float | None = None
    report: PrefillReport | None = None
    timings: PrefillTimings | None = None
    recompressed_entries: int = 0
    first_logprobs: TokenLogprobs | None = None
    scores: TokenScores | None = None
    admission_s: float = 0.0

    @property
    def pruned(self) -> bool:
        """Whether anything of the prompt was left out, in prefill or in decode."""
        report = self.report
        return report is not None and (
            report.num_selected_tokens < report.num_prompt_tokens
            or report.kv_bytes_kept < report.kv_bytes_full
            or self.recompressed_entries > 0
        )


@dataclass(frozen=True, slots=True)
class WinnowUsage:
    """Fields as in WinnowUsage of proto/winnow/v1/inference.proto."""

    selection_layer: int | None
    selection_full_layer: int | None
    no_selection_reason: str
    selected_tokens: int
    computed_share: float
    kv_bytes_full: int
    kv_bytes_kept: int
    rho: dict[int, float]
    recompressed_entries: int
    wire_bytes: int
    queue_s: float
    prefill_s: float
    exposed_transfer_s: float
    ttft_s: float
    cached_tokens: int
    computed_tokens: int
    recomputed_tokens: int
    saved_layer_tokens: int
    no_prefix_reason: str
    state_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Verification:
    """The answer to the whole prompt, and whether the one to the pruned prompt is the same.

    first_token_kl: as winnow.agreement.kl_lower_bound.  ttft_s, completion_tokens: the whole
    prompt's, which the request's own figures leave out.
    """

    text: str
    finish_reason: FinishReason
    text_agrees: bool
    first_token_agrees: bool
    first_token_kl: float
    completion_tokens: int
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a request's time, in seconds from its arrival."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was dropped of a prompt, and by which scores; where the time went.

    pieces: the text of each token; joined they are the prompt as the model read it.
    layer, scores: as layer_idx and scores of TokenScores; None for a token without a score.
    last_layers: by token, the last layer that computed it.
    window_size: the last tokens, which give the scores.  threshold: ρ below it selects.
    layer_entries: KV entries kept by layer, summed over KV heads; layer_bytes: their bytes, in the
    model's dtype.  layer_entries_full: without pruning.
    tokens_per_s: of the answers, from the first token to the last.
    """

    pieces: tuple[str, ...]
    layer: int | None
    scores: tuple[float | None, ...]
    last_layers: tuple[int, ...]
    num_layers: int
    num_kv_heads: int
    window_size: int
    layer_entries: tuple[int, ...]
    layer_entries_full: tuple[int, ...]
    layer_bytes: tuple[int, ...]
    threshold: float
    timeline: tuple[Span, ...]
    tokens_per_s: float

    def to_json(self) -> dict[str, Any]:
        """As `asdict`, which would take long for a long prompt."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, "timeline": [asdict(span) for span in self.timeline]}


@dataclass(frozen=True, slots=True)
class RequestUsage:
    """prompts: one entry per prompt, in order. completion_tokens: over all choices.

    explains: an explanation was requested.  explain: None too if prefill did not report.
    """

    prompt_tokens: int
    completion_tokens: int
    prompts: tuple[WinnowUsage, ...]
    verify: Verification | None = None
    explains: bool = False
    explain: Explanation | None = None

    def winnow(self) -> WinnowUsage:
        """Usage of all prompts together."""
        return _sum_up(self.prompts)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's `usage`, with `winnow` for all prompts together and, if several, for each."""
        winnow = asdict(self.winnow())
        if self.verify is not None:
            winnow["verify"] = asdict(self.verify)
        if self.explains:
            winnow["explain"] = None if self.explain is None else self.explain.to_json()
        if len(self.prompts) > 1:
            winnow["prompts"] = [asdict(prompt) for prompt in self.prompts]
        return {
            **token_counts(self.prompt_tokens, self.completion_tokens),
            "prompt_tokens_details": {"cached_tokens": winnow["cached_tokens"]},
            "winnow": winnow,
        }


def token_counts(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The standard OpenAI fields of `usage`."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def winnow_usage(stats: RunStats, shape: ModelShape) -> WinnowUsage:
    """Usage of one prompt whose run has finished."""
    report, timings = stats.report, stats.timings or _UNTOLD
    assert report is not None
    layer = report.selection_layer
    return WinnowUsage(
        selection_layer=layer,
        selection_full_layer=None if layer is None else shape.place_among_full(layer),
        no_selection_reason=report.no_selection_reason or "",
        selected_tokens=report.num_selected_tokens,
        computed_share=report.computed_share,
        kv_bytes_full=report.kv_bytes_full,
        kv_bytes_kept=report.kv_bytes_kept,
        rho=dict(report.rho),
        recompressed_entries=stats.recompressed_entries,
        wire_bytes=timings.wire_bytes,
        queue_s=timings.queue_s,
        prefill_s=timings.compute_s,
        exposed_transfer_s=timings.exposed_transfer_s,
        ttft_s=stats.ttft_s or 0.0,
        cached_tokens=report.num_cached_tokens,
        computed_tokens=report.num_computed_tokens,
        recomputed_tokens=report.num_recomputed_tokens,
        saved_layer_tokens=report.saved_layer_tokens,
        no_prefix_reason=report.no_prefix_reason or "",
        state_bytes=report.state_bytes,
    )


def _sum_up(prompts: Sequence[WinnowUsage]) -> WinnowUsage:
    """Sums of counts and maxima of times; fields that only a single prompt can have are empty."""
    if len(prompts) == 1:
        return prompts[0]
    full_bytes = sum(prompt.kv_bytes_full for prompt in prompts)
    lengths = [prompt.cached_tokens + prompt.computed_tokens for prompt in prompts]
    computed = sum(one.computed_share * n for one, n in zip(prompts, lengths, strict=True))
    return WinnowUsage(
        selection_layer=None,
        selection_full_layer=None,
        no_selection_reason="",
        selected_tokens=sum(prompt.selected_tokens for prompt in prompts),
        computed_share=computed / sum(lengths),
        kv_bytes_full=full_bytes,
        kv_bytes_kept=sum(prompt.kv_bytes_kept for prompt in prompts),
        rho={},
        recompressed_entries=sum(prompt.recompressed_entries for prompt in prompts),
        wire_bytes=sum(prompt.wire_bytes for prompt in prompts),
        queue_s=max(prompt.queue_s for prompt in prompts),
        prefill_s=max(prompt.prefill_s for prompt in prompts),
        exposed_transfer_s=max(prompt.exposed_transfer_s for prompt in prompts),
        ttft_s=max(prompt.ttft_s for prompt in prompts),
        cached_tokens=sum(prompt.cached_tokens for prompt in prompts),
        computed_tokens=sum(prompt.computed_tokens for prompt in prompts),
        recomputed_tokens=sum(prompt.recomputed_tokens for prompt in prompts),
        saved_layer_tokens=sum(prompt.saved_layer_tokens for prompt in prompts),
        no_prefix_reason="",
        state_bytes=sum(prompt.state_bytes for prompt in prompts),
    )
