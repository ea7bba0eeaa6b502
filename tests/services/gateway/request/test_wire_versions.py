"""This release beside one that speaks wire version 5 alone, as in a rolling upgrade."""

from pathlib import Path

import pytest
from grpc.aio import ServicerContext

from services.decode.generate import GenerateServicer
from tests.services.exposed import value
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from winnow.v1 import decode_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

OLD = (5,)


class OldServicer(GenerateServicer):
    """Generate as before wire version 6."""

    async def Generate(self, request: pb.GenerateRequest, context: ServicerContext) -> None:
        del request.wire_versions[:]
        request.wire_versions.extend(OLD)
        await super().Generate(request, context)


async def answer(service: TestService) -> str:
    done = await service.openai.completions.create(
        model=MODEL_NAME, prompt="a b c", max_tokens=8, temperature=0
    )
    await service.until_idle()
    return done.choices[0].text


async def test_an_older_decode_worker_is_pushed_to_as_it_knows(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_service(model_path, redis_url, namespace="new") as service:
        expected = await answer(service)
    monkeypatch.setattr("services.decode.worker.GenerateServicer", OldServicer)
    monkeypatch.setattr("services.decode.worker.WIRE_VERSIONS", OLD)
    async with running_service(model_path, redis_url, namespace="old") as service:
        (record,) = await service.registry.workers()
        assert record.wire_versions == OLD
        assert await answer(service) == expected
        (job,) = service.prefiller.jobs
        assert job.ticket is not None and job.ticket.wire_version == 5


async def test_a_worker_without_common_version_gets_nothing_and_is_reported(
    model_path: Path,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("services.decode.worker.WIRE_VERSIONS", (7, 8))
    async with running_service(model_path, redis_url, namespace="newer") as service:
        refused = await service.http.post(
            "/v1/completions", json={"model": MODEL_NAME, "prompt": "a"}
        )
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "no_decode_worker"
        assert "it speaks wire versions (7, 8); this gateway (5, 6)" in caplog.text
        await service.http.get("/ready")
        metrics = (await service.admin.get("/metrics")).text
        assert value(metrics, "winnow_incompatible_decode_workers") == 1
