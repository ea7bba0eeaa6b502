"""State of one job in a prefill worker."""

import contextlib
import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from services.common.jobs import PrefillJob, PrefillOutcome
from services.common.tracing import Span
from services.prefill.sender import Push
from services.prefill.split_push import SplitPush
from winnow.adapters.slots import LoadedAdapter
from winnow.engine.prefill import PrefillResult, PrefillRun
from winnow.engine.prompt_logprobs import PromptLogprobsRun
from winnow.engine.score_watch import ScoreWatch
from winnow.errors import WinnowError
from winnow.tokens import PromptLogprobs


@dataclass(eq=False, slots=True)
class Work:
    """A job in progress; cancelling `outcome` cancels it. Times are those of time.monotonic().

    num_to_compute: tokens that its first layer will compute, as far as was known when it came.
    run_layer_tokens, scoring_layer_tokens: what its prefill and its log-probabilities will cost.
    is_open: it was chosen once; from then on only the engine's thread ends it.
    is_over: the engine has nothing more to compute for it.
    adapter: in its slot until the end.
    compute_s, blocked_s: seconds it was computed, and in which the engine waited for the network.
    """

    job: PrefillJob
    num_to_compute: int
    run_layer_tokens: int
    scoring_layer_tokens: int
    outcome: "Future[PrefillOutcome]" = field(default_factory=Future)
    received_s: float = field(default_factory=time.monotonic)
    computed_s: float = 0.0
    compute_s: float = 0.0
    blocked_s: float = 0.0
    is_open: bool = False
    is_over: bool = False
    error: WinnowError | None = None
    run: PrefillRun | None = None
    watch: ScoreWatch | None = None
    result: PrefillResult | None = None
    scoring: PromptLogprobsRun | None = None
    logprobs: PromptLogprobs | None = None
    push: Push | SplitPush | None = None
    compute_span: Span | None = None
    transfer_span: Span | None = None
    adapter: LoadedAdapter | None = None

    @property
    def remaining_s(self) -> float:
        return self.received_s + self.job.deadline_s - time.monotonic()

    @property
    def queue_s(self) -> float:
        """Seconds a computed prompt waited for the engine, before its first layer or after it."""
        return self.computed_s - self.received_s - self.compute_s - self.blocked_s

    @property
    def can_go_on(self) -> bool:
        """False while the next layer would wait for the network for longer than a moment."""
        return self.push is None or self.scoring is not None or not self.push.is_held

    @property
    def next_layer_tokens(self) -> int:
        return self.num_to_compute if self.run is None else self.run.next_layer_tokens

    @property
    def layer_tokens_left(self) -> int:
        left = self.run_layer_tokens if self.run is None else self.run.layer_tokens_left
        return left + self.scoring_layer_tokens

    @property
    def tokens_left(self) -> int:
        """The share of the prompt's work that is left, in tokens that are computed."""
        run = self.run  # the engine's thread lets go of it at the end
        left = self.run_layer_tokens if run is None else run.layer_tokens_left
        return self.num_to_compute * left // self.run_layer_tokens

    def close(self) -> None:
        """Free what it holds; called by the engine's thread when it is over."""
        self.is_over = True
        if self.run is not None:
            self.run.close()
        self.run = self.scoring = None
        if self.adapter is not None:
            self.adapter.end_use()
            self.adapter = None

    def settle(self, outcome: PrefillOutcome | WinnowError) -> None:
        """Set the outcome; only the first one counts, and a cancelled job takes none."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(outcome, WinnowError):
                self.outcome.set_exception(outcome)
            else:
                self.outcome.set_result(outcome)
