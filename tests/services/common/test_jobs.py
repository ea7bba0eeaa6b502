"""Jobs and outcomes between processes of two versions, as a rollout has them."""

from typing import Any

import pytest

from services.common.jobs import PrefillJob, PrefillOutcome, PrefillTimings
from winnow.pruning_settings import PruningSettings
from winnow.report import PrefillReport

JOB = PrefillJob("r", 1, (1, 2), PruningSettings(), None, None, 10.0)
REPORT = PrefillReport(2, 2, 2, None, "off", (), 1.0, 8, 8, (2,))
OUTCOME = PrefillOutcome(REPORT, PrefillTimings(0.0, 0.0, 0.0, 0.0, 0))


@pytest.mark.parametrize(
    ("sent", "num_new"), [(JOB, 2), (REPORT, 4), (OUTCOME, 2)], ids=["job", "report", "outcome"]
)
def test_an_older_process_s_message_is_understood(sent: Any, num_new: int) -> None:
    arrived = object.__new__(type(sent))
    arrived.__setstate__(sent.__getstate__()[:-num_new])
    assert arrived == sent
