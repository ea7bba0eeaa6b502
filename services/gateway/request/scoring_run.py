"""The run of a prompt that is only scored: it returns log-probabilities and generates nothing.

It uses no decode worker: nothing is reserved, and no KV is sent.
"""

from collections.abc import AsyncGenerator

from services.common.jobs import PrefillJob
from services.common.tasks import end
from services.gateway.request.run import Run
from services.gateway.request.states import State
from winnow.tokens import Token


class PromptScoring(Run):
    """`tokens` yields one empty step when the prompt has been computed."""

    async def admit(self) -> None:
        """Reserve nothing; a full prefill queue refuses the prompt later."""

    async def tokens(self) -> AsyncGenerator[list[Token]]:
        self._begin_prefill()
        assert self._prefill is not None
        outcome = await self._prefill
        self.stats.report, self.stats.timings = outcome.report, outcome.timings
        self.stats.scores = outcome.scores
        yield []

    async def finish(self) -> None:
        self._enter(State.FINISHED)

    async def _free(self) -> None:
        if self._prefill is not None:
            await end(self._prefill)

    def _job(self, attempt: int, trace_context: str) -> PrefillJob:
        return self._scoring_job(attempt, trace_context)
