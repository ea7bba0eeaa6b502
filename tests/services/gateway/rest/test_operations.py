"""What operators and tools ask besides completions."""

import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from services.common.logs import TextFormatter
from services.gateway.rest.admin import AdminServer
from tests.services.exposed import samples, value
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from winnow.errors import InvalidSetting

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_lists_the_one_model(service: TestService) -> None:
    models = await service.openai.models.list()
    assert [model.id for model in models.data] == [MODEL_NAME]
    assert (await service.openai.models.retrieve(MODEL_NAME)).owned_by == "winnow"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        await service.openai.models.retrieve("other")


async def test_tokenize_and_detokenize_are_inverse(service: TestService) -> None:
    text = "the quick 漢 🎉<|end|>"
    answer = (await service.http.post("/tokenize", json={"prompt": text})).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 8192
    back = await service.http.post("/detokenize", json={"tokens": answer["tokens"]})
    assert back.json() == {"prompt": text}


async def test_an_empty_text_has_the_tokens_that_it_has(service: TestService) -> None:
    answer = (await service.http.post("/tokenize", json={"prompt": ""})).json()
    assert answer["count"] == len(answer["tokens"])


async def test_tokenize_renders_messages(service: TestService) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "model": MODEL_NAME}
    tokens = (await service.http.post("/tokenize", json=body)).json()["tokens"]
    back = await service.http.post("/detokenize", json={"tokens": tokens, "model": MODEL_NAME})
    assert back.json() == {"prompt": "<|user|>a<|end|><|assistant|>"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "tools": [{"type": "web"}]}, 400, "tools[0].type"),
        ("/tokenize", {"prompt": "a " * 9000}, 400, "prompt"),
        ("/tokenize", {"prompt": "a " * 1_000_000}, 400, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a " * 9000}]}, 400, "messages"),
        ("/detokenize", {"tokens": [5] * 8193}, 400, "tokens"),
        ("/detokenize", {"tokens": [320]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
async def test_refuses_bad_tokenizer_requests(
    service: TestService, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = await service.http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_is_ready_with_a_worker_and_prefill(service: TestService) -> None:
    assert (await service.http.get("/health")).json() == {"status": "ok"}
    probed = await service.http.get("/ready")
    assert (probed.status_code, probed.json()) == (200, {"status": "ready"})
    response = await service.admin.get("/ready")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ready",
        "decode_workers": 1,
        "prefill": True,
        "ending": False,
    }


@pytest.mark.parametrize("path", ["/metrics", "/metrics/targets"])
async def test_the_api_s_port_tells_nothing_of_the_inside(service: TestService, path: str) -> None:
    assert (await service.http.get(path)).status_code == 404


async def test_gateways_of_one_machine_share_the_operators_port(service: TestService) -> None:
    first, second = AdminServer(service.gateway), AdminServer(service.gateway)
    port = await first.start("127.0.0.1", 0)
    assert await second.start("127.0.0.1", port) == port
    await first.stop()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as admin:
        assert (await admin.get("/metrics/targets")).json()[0]["labels"]["__winnow_role"]
        await second.stop()
        with pytest.raises(httpx.TransportError):
            await admin.get("/health")


async def test_an_operators_port_that_is_taken_is_named(service: TestService) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidSetting, match=f"admin_port {port} on 127.0.0.1 cannot be used"):
            await AdminServer(service.gateway).start("127.0.0.1", port)


async def test_without_decode_worker_it_is_healthy_but_not_ready(
    model_path: Path, redis_url: str
) -> None:
    async with running_service(model_path, redis_url, num_workers=0) as service:
        assert (await service.http.get("/health")).status_code == 200
        probed = await service.http.get("/ready")
        assert (probed.status_code, probed.json()) == (503, {"status": "not ready"})
        response = await service.admin.get("/ready")
        assert (response.status_code, response.json()["decode_workers"]) == (503, 0)
        body = {"model": MODEL_NAME, "prompt": "a"}
        refused = await service.http.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"] == {
            "message": "no decode worker can serve the request now; the service's log has more",
            "type": "service_unavailable_error",
            "param": None,
            "code": "no_decode_worker",
        }


async def test_without_memory_a_request_is_told_to_try_again(
    model_path: Path, redis_url: str
) -> None:
    small = {"kv_memory_bytes": 1 << 20, "kv_overcommit": 1, "max_n": 64}
    async with running_service(model_path, redis_url, **small) as service:
        service.prefiller.hold_jobs()
        body = {"model": MODEL_NAME, "prompt": ["a"] * 16, "max_tokens": 200}
        refused = await service.http.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
        metrics = (await service.admin.get("/metrics")).text
        assert value(metrics, "winnow_requests_refused_total", reason="overloaded") == 1
        await service.until_idle()


async def test_metrics_tell_what_clients_got(model_path: Path, redis_url: str) -> None:
    async with running_service(model_path, redis_url) as service:
        await service.openai.completions.create(
            model=MODEL_NAME, prompt="a b c", max_tokens=5, extra_body={"ignore_eos": True}
        )
        text = (await service.admin.get("/metrics")).text
    assert value(text, "winnow_requests_finished_total", reason="length") == 1
    waiting = samples(text)["winnow_requests_waiting"]
    assert set(waiting.values()) == {0.0}
    assert len(waiting) == 2
    for name, expected in (
        ("winnow_requests_received_total", 1),
        ("winnow_requests_admitted_total", 1),
        ("winnow_requests_running", 0),
        ("winnow_generated_tokens_total", 5),
        ("winnow_request_generated_tokens_sum", 5),
        ("winnow_prompt_tokens_total", 5),
        ("winnow_ttft_seconds_count", 1),
        ("winnow_admission_seconds_count", 1),
        ("winnow_inter_token_seconds_count", 4),
        ("winnow_time_per_output_token_seconds_count", 1),
    ):
        assert value(text, name) == expected, name


async def test_a_gateway_that_ends_serves_on_but_sends_clients_elsewhere(
    model_path: Path, redis_url: str
) -> None:
    async with running_service(model_path, redis_url) as service:
        body = {"model": MODEL_NAME, "prompt": "a", "max_tokens": 2}
        before = await service.http.post("/v1/completions", json=body)
        assert "connection" not in before.headers
        service.gateway.ending = True
        last = await service.http.post("/v1/completions", json=body)
        assert (last.status_code, last.headers["connection"]) == (200, "close")
        assert (await service.http.get("/ready")).status_code == 503
        ready = await service.admin.get("/ready")
        assert (ready.status_code, ready.json()["ending"]) == (503, True)


async def test_neither_prompts_nor_answers_are_logged(
    service: TestService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    letter = await service.http.post("/tokenize", json={"prompt": "q", "add_special_tokens": False})
    (token_id,) = letter.json()["tokens"]
    body = {"model": MODEL_NAME, "prompt": "xylophone quartz", "max_tokens": 9}
    body |= {"logit_bias": {token_id: 100}}
    done = await service.http.post("/v1/completions", json=body)
    assert done.json()["choices"][0]["text"] == "q" * 9
    service.prefiller.failures = [ValueError("broken")]  # its traceback is logged
    broken = await service.http.post("/v1/completions", json=body)
    chat = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "xylophone"}], "n": 99}
    refused = await service.http.post("/v1/chat/completions", json=chat)
    assert (done.status_code, broken.status_code, refused.status_code) == (200, 500, 400)
    served = ("winnow", "services", "uvicorn")
    records = [record for record in caplog.records if record.name.startswith(served)]
    log = "\n".join(map(TextFormatter().format, records))
    assert "finished: " in log and "ValueError: broken" in log
    assert not any(word in log for word in ("xylophone", "quartz", "qqq"))
