"""What the page of `winnow explain` shows: an explanation in the form of the API's answers."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from winnow.completion import Completion
from winnow.explain import Explanation

_NUM_LEVELS = 9
_NOTE = "Times are medians of three rounds each, in turns, in one process on this machine."


def report(explanation: Explanation, model: str) -> dict[str, Any]:
    """As JSON: both answers with their usage as the API tells it, and the order at each layer."""
    return {
        "model": model,
        "settings": asdict(explanation.settings),
        "note": _NOTE,
        "runs": [
            _run(
                "Pruned",
                explanation.answer,
                explanation.prefill_s,
                _explained(explanation),
                explanation.selection_full_layer,
            ),
            _run("Without pruning", explanation.full_answer, explanation.full_prefill_s, {}),
        ],
        "layers": [
            {"layer": one.layer_idx, "levels": _levels(one.ranks, _num_shaded(explanation))}
            for one in explanation.layer_ranks
        ],
    }


def _run(
    label: str,
    answer: Completion,
    prefill_s: float,
    explained: dict[str, Any],
    full_layer: int | None = None,
) -> dict[str, Any]:
    done = answer.report
    timeline = [{"name": "prefill", "start_s": 0.0, "end_s": prefill_s}]
    usage = {
        "selection_layer": done.selection_layer,
        "selection_full_layer": full_layer,
        "no_selection_reason": done.no_selection_reason or "",
        "selected_tokens": done.num_selected_tokens,
        "computed_share": done.computed_share,
        "kv_bytes_full": done.kv_bytes_full,
        "kv_bytes_kept": done.kv_bytes_kept,
        "cached_tokens": done.num_cached_tokens,
        "rho": {layer: rho for layer, rho in done.rho if math.isfinite(rho)},
        "explain": {"timeline": timeline, **explained},
    }
    return {
        "label": label,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prefill_s": prefill_s,
        "usage": {
            "prompt_tokens": done.num_prompt_tokens,
            "completion_tokens": len(answer.token_ids),
            "winnow": usage,
        },
    }


def _explained(explanation: Explanation) -> dict[str, Any]:
    scores, done = explanation.scores, explanation.report
    shares: list[float | None] = [float(f"{score:.3g}") for score in scores.scores.tolist()]
    return {
        "pieces": explanation.pieces,
        "layer": scores.layer_idx,
        "scores": shares + [None] * (done.num_prompt_tokens - len(shares)),
        "last_layers": scores.last_layers.tolist(),
        "num_layers": len(done.layer_entries),
        "num_kv_heads": explanation.num_kv_heads,
        "window_size": explanation.settings.window_size,
        "layer_entries": done.layer_entries,
        "layer_entries_full": explanation.layer_entries_full,
        "layer_bytes": explanation.layer_bytes,
        "threshold": explanation.settings.threshold,
    }


def _num_shaded(explanation: Explanation) -> int:
    """The ranks that are shaded: those that went on, or the best quarter where all did."""
    done, window_size = explanation.report, explanation.settings.window_size
    if done.num_selected_tokens < done.num_prompt_tokens:
        return max(1, done.num_selected_tokens - window_size)
    return max(1, math.ceil((done.num_prompt_tokens - window_size) / 4))


def _levels(ranks: Sequence[int], num_shaded: int) -> str:
    """A digit for each token, as `levelsOf` in text.js."""
    return "".join(str(_level(rank, num_shaded)) for rank in ranks)


def _level(rank: int, num_shaded: int) -> int:
    if not 0 < rank <= num_shaded:
        return 0
    return min(_NUM_LEVELS, 1 + int(_NUM_LEVELS * (1 - math.sqrt(rank / num_shaded))))
