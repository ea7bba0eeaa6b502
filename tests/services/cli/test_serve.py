"""`winnow serve`: what it refuses at once, and reads off Ray Serve's messages about replicas."""

from pathlib import Path
from typing import Any

import pytest

from services.cli.serve import _raise_failure, require_gpus, run_service
from services.common.settings import Settings
from winnow.errors import InvalidSetting, UnusableModel, WinnowError

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


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"device": "cuda"}, 2),
        ({"device": "cuda", "worker_num_gpus": 0.5}, 1),
        ({"device": "cuda", "decode_workers": 0}, 1),
        ({"device": "cuda", "decode_workers": 3, "decode_tensor_parallel": 4}, 13),
        ({"worker_num_gpus": 1, "prefill_replicas": 2}, 3),
    ],
)
def test_refuses_to_wait_for_gpus_that_are_not_there(given: dict[str, Any], wanted: int) -> None:
    require_gpus(Settings(**given), wanted)
    said = rf"need {wanted} GPUs, worker_num_gpus for each; this machine has {wanted - 1}$"
    with pytest.raises(InvalidSetting, match=said):
        require_gpus(Settings(**given), wanted - 1)


def test_workers_on_a_cpu_need_no_gpu() -> None:
    require_gpus(Settings(tensor_parallel=4), 0)
