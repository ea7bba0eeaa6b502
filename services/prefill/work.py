"""State of one job in a prefill worker."""

import contextlib
import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from services.common.jobs import PrefillJob, PrefillOutcome
from services.common.tracing import Span
from winnow.engine.prefill import PrefillResult
from winnow.errors import WinnowError
from winnow.tokens import PromptLogprobs


@dataclass(eq=False, slots=True)
class Work:
    """A job in progress; cancelling `outcome` cancels it. Times are those of time.monotonic().

    blocked_s: seconds the engine waited for the network to take a layer.
    """

    job: PrefillJob
    outcome: "Future[PrefillOutcome]" = field(default_factory=Future)
    received_s: float = field(default_factory=time.monotonic)
    started_s: float = 0.0
    computed_s: float = 0.0
    blocked_s: float = 0.0
    failed: bool = False
    transfer_span: Span | None = None
    result: PrefillResult | None = None
    logprobs: PromptLogprobs | None = None

    @property
    def remaining_s(self) -> float:
        return self.received_s + self.job.deadline_s - time.monotonic()

    def settle(self, outcome: PrefillOutcome | WinnowError) -> None:
        """Set the outcome; only the first one counts, and a cancelled job takes none."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(outcome, WinnowError):
                self.outcome.set_exception(outcome)
            else:
                self.outcome.set_result(outcome)
