"""Prompts find their replica by Ray Serve's own ways, in a cluster of this machine."""

import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from services.common.jobs import PrefillJob
from tests.services.gateway.prefill.deployments import (
    BLOCK_TOKENS,
    PassingGateway,
    RememberingPrefill,
    Served,
)
from winnow.errors import DeadlineExceeded, PrefillLost
from winnow.pruning_settings import PruningSettings

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).parents[4]
SOON_S = 60.0
N = 100 * BLOCK_TOKENS
TOKEN_S = 0.5 / N  # a new document takes half a second
PERIOD_S = 0.5
REPORTED_S = 4 * PERIOD_S  # until other gateways know what a replica holds
CANCELLED_S = 6.0  # until a router has forgotten what was cancelled on its way
QUESTION = 8
_ids = itertools.count()


def job(
    document: int,
    *,
    question: int = 0,
    num_tokens: int = QUESTION,
    document_tokens: int = N,
) -> PrefillJob:
    """A question about a document."""
    token_ids = (document,) * document_tokens + (10_000 + question,) * num_tokens
    return PrefillJob(f"r{next(_ids)}", 1, token_ids, PruningSettings(), None, None, SOON_S)


class Gateway:
    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.handle = handle

    def prefill(self, *rounds: Sequence[PrefillJob], by_reference: bool = True) -> list[list[Any]]:
        response = self.handle.prefill.remote(rounds, by_reference)
        answers: list[list[Any]] = response.result(timeout_s=SOON_S)
        return answers

    def wait_until_reported(self) -> None:
        """Until there are two replicas, and what they have reported decides, not chance."""
        deadline_s = time.monotonic() + SOON_S
        pids: list[int] = []
        while len(pids) < 12 or len(set(pids)) < 2:
            assert time.monotonic() < deadline_s
            document = 1_000 + next(_ids)
            rounds = [[job(document, question=i, document_tokens=32)] for i in range(2)]
            _, (second,) = self.prefill(*rounds)
            pids = [*pids[-11:], second.pid] if second.held_tokens else []


@pytest.fixture(scope="module")
def gateways() -> Iterator[tuple[Gateway, Gateway]]:
    ray.init(
        "local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
    )
    router = {
        "request_router_class": "services.gateway.prefill.router.PrefillRouter",
        "request_routing_stats_period_s": PERIOD_S,
    }
    options: dict[str, Any] = {
        "max_ongoing_requests": 1000,
        "health_check_period_s": 1,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": 1,
        "ray_actor_options": {
            "num_cpus": 0.1,
            "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
        },
    }
    prefill = (
        cast(serve.Deployment, RememberingPrefill)
        .options(
            num_replicas=2,
            request_router_config=RequestRouterConfig.model_validate(router),
            **options,
        )
        .bind(TOKEN_S)
    )
    passing = cast(serve.Deployment, PassingGateway)
    other = passing.options(name="Other", **options).bind(prefill, None)
    handle = serve.run(passing.options(**options).bind(prefill, other), route_prefix=None)
    gateways = Gateway(handle), Gateway(serve.get_deployment_handle("Other", "default"))
    for one in gateways:
        one.wait_until_reported()
    yield gateways
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def gateway(gateways: tuple[Gateway, Gateway]) -> Gateway:
    return gateways[0]


@pytest.mark.parametrize("by_reference", [True, False], ids=["actor call", "grpc"])
def test_a_question_goes_at_once_to_the_replica_that_computed_the_document(
    gateway: Gateway, by_reference: bool
) -> None:
    rounds = [[job(by_reference, question=question)] for question in range(6)]
    served = [one for (one,) in gateway.prefill(*rounds, by_reference=by_reference)]
    assert len({one.pid for one in served}) == 1
    assert [one.held_tokens for one in served] == [0] + [N] * 5


def test_another_gateway_finds_the_replica_by_what_it_reports(
    gateways: tuple[Gateway, Gateway],
) -> None:
    gateway, other = gateways
    documents = range(2, 5)
    rounds = gateway.prefill(*([job(document)] for document in documents))
    time.sleep(3 * REPORTED_S)
    found = other.prefill(*([job(document, question=1)] for document in documents))
    assert found == [[Served(first.pid, N)] for (first,) in rounds]


def test_new_documents_that_come_at_once_are_spread(gateway: Gateway) -> None:
    long = [job(document, document_tokens=4 * N) for document in range(10, 20)]  # two seconds
    (served,) = gateway.prefill(long)
    assert sorted(Counter(one.pid for one in served).values()) == [5, 5]


def test_questions_that_come_while_the_document_is_computed_go_to_the_same_replica(
    gateway: Gateway,
) -> None:
    (served,) = gateway.prefill([job(20, question=question) for question in range(6)])
    assert len({one.pid for one in served}) == 1


def test_questions_spill_over_from_a_hot_replica(gateway: Gateway) -> None:
    """The fifth would wait for the tokens of four others, which are as many as the document's."""
    document: dict[str, int] = {"document": 30, "document_tokens": 4 * N}
    questions = [job(**document, question=idx, num_tokens=N) for idx in range(1, 9)]
    ((first,), served) = gateway.prefill([job(**document)], questions)
    counts = Counter(one.pid for one in served)
    assert len(counts) == 2
    assert counts[first.pid] >= 4


def test_prompts_that_were_cancelled_are_no_work(gateway: Gateway) -> None:
    """Twice as many questions at once would not all stay with their document."""
    questions = [job(40, question=question, num_tokens=100) for question in range(26)]
    doomed = [replace(one, deadline_s=0.02) for one in questions[:13]]
    ((first,), ends) = gateway.prefill([job(40)], doomed)
    time.sleep(CANCELLED_S)
    (served,) = gateway.prefill(questions[13:])
    assert {type(end) for end in ends} == {DeadlineExceeded}
    assert served == [Served(first.pid, N)] * 13


def test_calls_without_a_prompt_go_to_any(gateway: Gateway) -> None:
    for _ in range(4):
        assert gateway.handle.ready.remote().result(timeout_s=SOON_S)


@pytest.mark.parametrize("by_reference", [True, False], ids=["actor call", "grpc"])
def test_when_a_replica_is_lost_its_prompts_go_elsewhere_and_stay_there(
    gateway: Gateway, by_reference: bool
) -> None:
    document = 50 + by_reference
    ((first,),) = gateway.prefill([job(document)], by_reference=by_reference)
    time.sleep(REPORTED_S)
    slow = job(document, question=1, num_tokens=8 * N)  # four seconds
    asked = gateway.handle.prefill.remote([[slow]], by_reference)
    time.sleep(1.5)
    os.kill(first.pid, signal.SIGKILL)
    ((error,),) = asked.result(timeout_s=SOON_S)
    assert isinstance(error, PrefillLost)
    served = answered(gateway, document, by_reference)
    assert served.pid != first.pid
    gateway.wait_until_reported()  # its successor too
    assert gateway.prefill([job(document, question=3)]) == [[Served(served.pid, N)]]


def answered(gateway: Gateway, document: int, by_reference: bool) -> Served:
    """By a replica that is there, as soon as the loss is known: until then calls fail."""
    deadline_s = time.monotonic() + SOON_S
    while time.monotonic() < deadline_s:
        ((end,),) = gateway.prefill([job(document, question=2)], by_reference=by_reference)
        if isinstance(end, Served):
            return end
        assert isinstance(end, PrefillLost)
        time.sleep(0.1)
    raise AssertionError("nobody answers")
