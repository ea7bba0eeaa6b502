"""A context that scaling or the operator has changed, alike for gateway, prefill and decode."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from services.decode.worker import DecodeWorker
from tests.deadlines import SOON_S
from tests.models_in_code import save_tiny_model
from tests.services.gateway.service import MODEL_NAME, TestService, running_service

pytestmark = pytest.mark.asyncio(loop_scope="module")

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "rope_theta": 10000.0,
}


@pytest.fixture(scope="module")
def yarn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yarn")
    return save_tiny_model(folder, rope_parameters=YARN, max_position_embeddings=1024)


async def ask(service: TestService, num_tokens: int, **more: Any) -> tuple[int, dict[str, Any]]:
    body = {"model": MODEL_NAME, "prompt": [7] * num_tokens, "ignore_eos": True} | more
    response = await service.http.post("/v1/completions", json=body)
    return response.status_code, response.json()


async def window(service: TestService) -> int:
    models = (await service.http.get("/v1/models")).json()
    return int(models["data"][0]["max_model_len"])


async def test_a_prompt_beyond_the_length_before_scaling_is_answered(
    yarn: Path, redis_url: str
) -> None:
    async with running_service(yarn, redis_url) as service:
        assert await window(service) == 4096
        status, answer = await ask(service, 2000, max_tokens=3)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
        assert (await ask(service, 4096, max_tokens=1))[0] == 400
        await service.until_idle()


async def test_max_model_len_is_the_limit_of_prompt_and_answer(yarn: Path, redis_url: str) -> None:
    async with running_service(yarn, redis_url, max_model_len=100) as service:
        assert await window(service) == 100
        assert (await ask(service, 100))[0] == 400
        status, answer = await ask(service, 90)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 10)
        await service.until_idle()


async def test_a_decode_worker_with_another_max_model_len_gets_nothing(
    yarn: Path, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_service(yarn, redis_url, num_workers=0, max_model_len=100) as service:
        worker = DecodeWorker(service.settings.model_copy(update={"max_model_len": 200}))
        await worker.start()
        try:
            async with asyncio.timeout(SOON_S):
                while "it holds model" not in caplog.text:
                    status, answer = await ask(service, 50)
                    assert (status, answer["error"]["code"]) == (503, "no_decode_worker")
        finally:
            await worker.stop()
