"""`winnow serve`: what it refuses at once, and reads off Ray Serve's messages about replicas."""

from pathlib import Path

import pytest

from services.cli.serve import _raise_failure, run_service
from services.common.settings import Settings
from winnow.errors import UnusableModel, WinnowError

TRACEBACK = """A replica failed to start with exception. Retrying 2 more time(s). Error:
ray::ServeReplica:winnow:Prefill.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
RuntimeError: Traceback (most recent call last):
  File "services/prefill/worker.py", line 30, in __init__
    load_model(settings.model)
{last}

"""


def test_a_replica_without_fault_is_none() -> None:
    _raise_failure("Prefill", "")
    _raise_failure("Prefill", "Deployment 'Prefill' has 1 replicas that take long to initialize.")


def test_a_replica_s_own_error_is_raised_as_its_class() -> None:
    message = TRACEBACK.format(last="winnow.errors.UnusableModel: /models/x has no config.json")
    with pytest.raises(
        UnusableModel, match=r"^Prefill cannot start: /models/x has no config\.json"
    ):
        _raise_failure("Prefill", message)


def test_any_other_error_is_raised_at_the_first_try_by_its_last_line() -> None:
    message = TRACEBACK.format(last="OSError: [Errno 28] No space left on device")
    with pytest.raises(WinnowError, match=r"^Decode cannot start: OSError: \[Errno 28\] No space"):
        _raise_failure("Decode", message)


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("nope", "does not exist"),
        (".", "has no config.json"),
        ("n" * 300, "cannot be read"),
    ],
)
def test_what_can_be_known_before_ray_starts_is_refused_before(
    tmp_path: Path, folder: str, reason: str
) -> None:
    settings = Settings(model=str(tmp_path / folder), port=0, grpc_port=0, admin_port=0)
    steps: list[str] = []
    with pytest.raises(UnusableModel, match=reason):
        run_service(settings, steps.append, lambda _: None)
    assert steps == []
