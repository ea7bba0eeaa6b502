import asyncio
import shutil
import socket
import threading
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.common.messages import sampling_to_proto
from services.common.redis_registry import RedisRegistry
from services.common.registry import FEATURES, GRAMMAR
from services.common.settings import Settings
from services.decode.worker import DecodeWorker
from tests.deadlines import SOON_S
from tests.services.decode.client import GREEDY, Client, error_of, token_ids_of
from tests.services.decode.conftest import StartWorker
from tests.services.exposed import value
from winnow.decoder import DecoderModel
from winnow.errors import InvalidSetting, NoDecodeWorker, NotFinite, UnusableModel
from winnow.v1 import decode_pb2 as pb
from winnow.wire import WIRE_VERSIONS

pytestmark = pytest.mark.asyncio(loop_scope="module")

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(worker: DecodeWorker, service: str = "winnow.v1.Decode") -> int:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=SOON_S)
        return int(answer.status)


def listening_ports() -> set[int]:
    connections = psutil.Process().net_connections("tcp")
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


def our_threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(("winnow", "Thread-"))}


async def test_registers_itself(worker: DecodeWorker, registry: RedisRegistry) -> None:
    record = next(r for r in await registry.workers() if r.worker_id == worker.worker_id)
    assert (record.address, record.kv_address) == (worker.address, worker.kv_address)
    assert record.fingerprint == worker.engine.model.fingerprint
    assert record.model_name == "llama"
    assert record.wire_versions == WIRE_VERSIONS
    assert record.pages_free == record.pages_total == worker.engine.stats().pool.pages_total
    assert not record.draining
    assert record.features == (*FEATURES, GRAMMAR)


async def test_without_a_tokenizer_it_takes_no_grammar_and_says_so(
    start_worker: StartWorker,
    registry: RedisRegistry,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(tiny_models["llama"] / name, tmp_path)
    worker = await start_worker(model=str(tmp_path))
    record = next(r for r in await registry.workers() if r.worker_id == worker.worker_id)
    assert record.features == FEATURES
    assert "requests with a grammar go to other workers" in caplog.text
    async with Client(worker) as client:
        request = client.request(grammar=pb.Grammar(regex="a"))
        assert (await error_of(client.generate(request))).code == "invalid_grammar"


async def test_announces_the_ports_that_lead_to_it(
    start_worker: StartWorker, registry: RedisRegistry
) -> None:
    worker = await start_worker(decode_advertised_port=17000, kv_advertised_port=17001)
    record = next(r for r in await registry.workers() if r.worker_id == worker.worker_id)
    assert (record.address, record.kv_address) == ("127.0.0.1:17000", "127.0.0.1:17001")


async def test_renews_its_record(start_worker: StartWorker, registry: RedisRegistry) -> None:
    worker = await start_worker(lease_s=0.6)
    async with Client(worker) as client, asyncio.timeout(SOON_S):
        call = client.generate(client.request())
        assert (await call.read()).HasField("admitted")
        while not any(  # the record of the next heartbeat tells of the reservation
            r.running == 1 for r in await registry.workers() if r.worker_id == worker.worker_id
        ):
            pass
        call.cancel()
        await client.until_idle()


async def test_answers_health_and_reflection(worker: DecodeWorker) -> None:
    assert await health(worker) == SERVING
    assert await health(worker, "") == SERVING
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([request]), timeout=SOON_S):
            names = {service.name for service in answer.list_services_response.service}
    assert {"winnow.v1.Decode", "grpc.health.v1.Health"} <= names


async def test_metrics_show_pages_and_steps(worker: DecodeWorker, client: Client) -> None:
    call = await client.admit(client.request())
    await client.push(client.frames())
    await token_ids_of(call)
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"http://127.0.0.1:{worker.metrics_port}/metrics")).text
    assert value(text, "winnow_kv_pages") == worker.engine.stats().pool.pages_total
    assert value(text, "winnow_decode_step_seconds_count") > 0
    assert value(text, "winnow_transfer_received_bytes_total") > 0
    assert value(text, "winnow_draining") == 0


async def test_announces_where_its_metrics_are(
    worker: DecodeWorker, registry: RedisRegistry
) -> None:
    (target,) = [t for t in await registry.targets() if t.worker_id == worker.worker_id]
    assert (target.address, target.role) == (f"127.0.0.1:{worker.metrics_port}", "decode")


async def test_draining_lets_what_runs_finish_and_admits_nothing(
    start_worker: StartWorker, registry: RedisRegistry
) -> None:
    worker = await start_worker()
    async with Client(worker) as client, asyncio.timeout(SOON_S):
        running = await client.admit(client.request())
        drain = asyncio.ensure_future(client.decode.Drain(pb.DrainRequest(), timeout=SOON_S))
        while not (await client.status()).draining:
            pass
        assert await health(worker) == NOT_SERVING
        assert await health(worker, "grpc.health.v1.Health") == SERVING
        refused = client.generate(client.request("r2"))
        error = await error_of(refused)
        assert isinstance(error, NoDecodeWorker)
        assert await refused.code() is grpc.StatusCode.UNAVAILABLE
        while not next(
            r for r in await registry.workers() if r.worker_id == worker.worker_id
        ).draining:
            pass
        assert not drain.done()
        await client.push(client.frames())
        assert len(await token_ids_of(running)) == GREEDY.max_tokens
        assert (await drain).remaining_requests == 0


async def test_drain_answers_before_its_deadline(start_worker: StartWorker) -> None:
    worker = await start_worker()
    async with Client(worker) as client:
        running = await client.admit(client.request())
        answer = await client.decode.Drain(pb.DrainRequest(), timeout=0.6)
        assert answer.remaining_requests == 1
        running.cancel()
        await client.until_idle()


async def test_a_request_whose_numbers_broke_ends_with_an_error(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = await client.admit(client.request())
    frames = client.frames()
    broken = torch.full((1, client.worker.engine.model.vocab_size), float("nan"))
    monkeypatch.setattr(DecoderModel, "logits", lambda model, hidden: broken)
    await client.push(frames)
    assert isinstance(await error_of(call), NotFinite)
    assert await call.code() is grpc.StatusCode.INTERNAL
    await client.until_idle()


async def test_stop_leaves_nothing_behind(
    tiny_models: dict[str, Path], redis_url: str, registry: RedisRegistry
) -> None:
    ports, threads = listening_ports(), our_threads()
    worker = DecodeWorker(
        Settings(
            model=str(tiny_models["llama"]),
            redis_url=redis_url,
            namespace="decode-tests",
            kv_memory_bytes=16 << 20,
        )
    )
    await worker.start()
    async with Client(worker) as client:
        sampling = sampling_to_proto(replace(GREEDY, max_tokens=4000, ignore_eos=False))
        grammar = pb.Grammar(regex="[ab]{5000}")
        running = await client.admit(client.request(sampling=sampling, grammar=grammar))
        await client.push(client.frames())
        while not (await running.read()).tokens.tokens:
            pass
        assert {"winnow-masks_0", "winnow-grammar"} <= our_threads()
        assert len(listening_ports() - ports) == 3
        await worker.stop()
        assert (await error_of(running)).code in ("no_decode_worker", "cancelled")
    async with asyncio.timeout(SOON_S):  # grpc closes sockets and ends its threads on its own
        while listening_ports() != ports or not our_threads() <= threads:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert worker.worker_id not in {r.worker_id for r in await registry.workers()}


async def test_its_end_is_no_error_for_those_that_are_connected(
    tiny_models: dict[str, Path],
    redis_url: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for server in ("control_server", "kv_server"):  # however long this process takes to close
        monkeypatch.setattr(f"services.decode.{server}.STOP_GRACE_S", SOON_S)
    worker = DecodeWorker(
        Settings(model=str(tiny_models["llama"]), redis_url=redis_url, kv_memory_bytes=16 << 20)
    )
    await worker.start()
    async with Client(worker) as client:
        call = await client.admit(client.request())
        await client.push(client.frames())
        await token_ids_of(call)
        await worker.stop()
        with pytest.raises(NoDecodeWorker):  # once it knows of the end
            await client.push(client.frames())
    assert "goaway" not in capfd.readouterr().err.lower()


@pytest.mark.parametrize("setting", ["decode_port", "kv_port", "metrics_port"])
async def test_a_taken_port_stops_the_start_with_its_name(
    tiny_models: dict[str, Path], redis_url: str, setting: str
) -> None:
    before = listening_ports()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = Settings(
            model=str(tiny_models["llama"]),
            redis_url=redis_url,
            kv_memory_bytes=16 << 20,
            **{setting: port},
        )
        worker = DecodeWorker(settings)
        with pytest.raises(InvalidSetting) as refusal:
            await worker.start()
    assert refusal.value.param == setting
    assert str(port) in refusal.value.message
    async with asyncio.timeout(SOON_S):
        while listening_ports() != before:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_missing_model_stops_the_start(redis_url: str, tmp_path: Path) -> None:
    worker = DecodeWorker(Settings(model=str(tmp_path), redis_url=redis_url))
    with pytest.raises(UnusableModel):
        await worker.start()


async def test_memory_too_small_for_the_model_stops_the_start(
    tiny_models: dict[str, Path], redis_url: str
) -> None:
    settings = Settings(model=str(tiny_models["llama"]), redis_url=redis_url, kv_memory_bytes=1000)
    with pytest.raises(InvalidSetting, match="kv_memory_bytes is 1,000"):
        await DecodeWorker(settings).start()
