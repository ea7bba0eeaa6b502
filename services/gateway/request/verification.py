"""The answer to a pruned prompt beside the one to the whole prompt."""

from collections.abc import Sequence

from services.gateway.request.choices import Delta
from services.gateway.request.run import Run
from services.gateway.usage import Verification
from winnow.agreement import kl_lower_bound


class Comparison:
    """Of a request that is to be verified: choice 0 is its answer, choice 1 the unpruned one."""

    def __init__(self) -> None:
        self._deltas: tuple[list[Delta], list[Delta]] = ([], [])

    def take(self, delta: Delta) -> bool:
        """Notes the delta; whether it is for the client to see."""
        self._deltas[delta.index].append(delta)
        return delta.index == 0

    def result(self, runs: Sequence[Run]) -> Verification:
        """Once every delta was taken."""
        pruned, whole = self._deltas
        first_pruned, first_whole = (run.stats.first_logprobs for run in runs)
        assert first_pruned is not None and first_whole is not None
        finish_reason = whole[-1].finish_reason
        assert finish_reason is not None
        return Verification(
            text=_text(whole),
            finish_reason=finish_reason,
            text_agrees=_text(whole) == _text(pruned),
            first_token_agrees=whole[0].tokens[0].token_id == pruned[0].tokens[0].token_id,
            first_token_kl=kl_lower_bound(first_whole, first_pruned),
            completion_tokens=sum(len(delta.tokens) for delta in whole),
            ttft_s=runs[1].stats.ttft_s or 0.0,
        )


def _text(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)
