"""The interface of prefill that the gateway uses."""

from typing import Protocol

from services.common.jobs import PrefillJob, PrefillOutcome


class Prefiller(Protocol):
    """Prefill as the gateway sees it: in the service a Ray Serve handle (wrapped in app.py)."""

    async def prefill(self, job: PrefillJob) -> PrefillOutcome:
        """Compute one prompt's KV and push it to `job.kv_address`; returns when it is in place.

        Without an address only the prompt's log-probabilities are computed and returned.

        Cancelling the call stops the work.  Raises WinnowError: PrefillFailed or a TransferRefused
        if another attempt may succeed.
        """

    async def ready(self) -> bool:
        """True if a prefill worker can take a job now."""
