"""What Ray is asked to set aside for workers."""

from typing import Any

import pytest
from ray import serve

from services.app import build_app
from services.common.settings import Settings


def workers(settings: Settings) -> dict[str, serve.Deployment]:
    gateway = build_app(settings)._bound_deployment
    arguments: tuple[Any, ...] = gateway.init_args
    _, prefill, decode = arguments
    return {"prefill": prefill._bound_deployment, "decode": decode._bound_deployment}


def group_of(worker: serve.Deployment) -> tuple[Any, Any]:
    config = worker._replica_config
    return config.placement_group_bundles, config.placement_group_strategy


@pytest.mark.parametrize(
    ("changes", "bundles"),
    [
        ({"device": "cuda"}, {"prefill": {"CPU": 1, "GPU": 4}, "decode": {"CPU": 1, "GPU": 4}}),
        ({"device": "cpu"}, {"prefill": {"CPU": 1}, "decode": {"CPU": 1}}),
        (
            {"device": "cuda", "decode_tensor_parallel": 2, "decode_num_cpus": 0},
            {"prefill": {"CPU": 1, "GPU": 4}, "decode": {"GPU": 2}},
        ),
    ],
)
def test_the_ranks_of_a_worker_are_a_strictly_packed_group(
    changes: dict[str, Any], bundles: dict[str, dict[str, float]]
) -> None:
    settings = Settings(tensor_parallel=4, **changes)
    for kind, worker in workers(settings).items():
        assert group_of(worker) == ([bundles[kind]], "STRICT_PACK")
        assert worker.ray_actor_options is not None
        assert worker.ray_actor_options["num_gpus"] == bundles[kind].get("GPU", 0)


def test_a_worker_of_one_process_is_an_actor_alone() -> None:
    for worker in workers(Settings(device="cuda")).values():
        assert group_of(worker) == (None, None)
        assert worker.ray_actor_options is not None
        assert worker.ray_actor_options["num_gpus"] == 1
