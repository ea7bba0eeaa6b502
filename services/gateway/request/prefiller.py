"""What the gateway asks of prefill, whoever carries it out."""

from typing import Protocol

from services.common.jobs import PrefillJob, PrefillOutcome


class Prefiller(Protocol):
    """Prefill as the gateway sees it: in the service a Ray Serve handle (app.py wraps it)."""

    async def prefill(self, job: PrefillJob) -> PrefillOutcome:
        """Compute one prompt's KV and push it to `job.kv_address`; returns when it is in place.

        Without an address it goes nowhere, and the prompt's log-probabilities are all that returns.

        Cancelling the call stops the work. Raises WinnowError: PrefillFailed or a TransferRefused
        where another attempt may succeed.
        """

    async def ready(self) -> bool:
        """True if a prefill worker can take a job now."""
