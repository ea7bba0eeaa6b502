"""The whole service with prefill and decode on two ranks each, in four processes."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import pytest

from services.decode.worker import DecodeWorker
from services.prefill.parts import Outcome
from services.prefill.rank import EXTENSION
from services.prefill.sender import Delivered
from services.prefill.split_push import SplitPush
from tests.deadlines import SOON_S
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from tests.winnow.adapters.made import save_adapter
from tests.winnow.drive import prompt
from winnow.adapters.ref import AdapterRoom
from winnow.distributed.loading import load_on_ranks
from winnow.distributed.ranks import Ranks
from winnow.distributed.split_decoder import SplitDecoder
from winnow.local import Winnow
from winnow.sampling_params import SamplingParams
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

NAMESPACE = "two-ranks"
PRUNING: dict[str, Any] = {
    "method": "asl",
    "select_tokens": 40,
    "window_size": 8,
    "kernel_size": 3,
    "observed_layers": 2,
    "min_layer": 1,
    "threshold": 1.2,
    "kv_budget": 30,
    "decode_budget": 40,
    "recompress_interval": 8,
}
PROGRAM = """
import asyncio
from services.common.settings_sources import load_settings
from services.decode.main import run_decode
asyncio.run(run_decode(load_settings()))
"""


@asynccontextmanager
async def two_rank_worker(
    model: Path, redis_url: str, adapters: dict[str, Path]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A decode worker of two processes; yields its rank 0 while they start."""
    variables = {
        "WINNOW_MODEL": str(model),
        "WINNOW_REDIS_URL": redis_url,
        "WINNOW_NAMESPACE": NAMESPACE,
        "WINNOW_KV_MEMORY_BYTES": str(64 << 20),
        "WINNOW_NUM_THREADS": "1",
        "WINNOW_DECODE_TENSOR_PARALLEL": "2",
        "WINNOW_ADAPTERS": " ".join(f"{name}={folder}" for name, folder in adapters.items()),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, env=os.environ | variables
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def two_rank_prefill(model: Path) -> AsyncIterator[tuple[SplitDecoder, Ranks]]:
    """Prefill's model, on this process and another one."""
    own, ranks = await asyncio.to_thread(
        lambda: load_on_ranks(
            model, 2, lambda reason: None, extension=EXTENSION, adapter_room=AdapterRoom(1, 4)
        )
    )
    try:
        yield SplitDecoder(own, ranks), ranks
    finally:
        await asyncio.to_thread(ranks.close)


async def until_ready(service: TestService, worker: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(2 * SOON_S):
        while (await service.http.get("/ready")).status_code != 200:
            assert worker.returncode is None
            await asyncio.sleep(0.05)


def request(token_ids: list[int], max_tokens: int, model: str = MODEL_NAME) -> pb.CompleteRequest:
    return pb.CompleteRequest(
        model=model,
        token_ids=pb.TokenIds(ids=token_ids),
        max_tokens=max_tokens,
        temperature=0,
        ignore_eos=True,
    )


async def tokens_of(
    stub: InferenceStub, token_ids: list[int], max_tokens: int, model: str = MODEL_NAME
) -> list[int]:
    return [
        token
        async for chunk in stub.Complete(request(token_ids, max_tokens, model), timeout=SOON_S)
        for choice in chunk.choices
        for token in choice.token_ids
    ]


async def kill_in_mid_answer(
    stub: InferenceStub, token_ids: list[int], max_tokens: int, worker: psutil.Process
) -> tuple[list[int], list[psutil.Process]]:
    """The tokens of an answer during which the worker's other rank is killed, and that rank."""
    found: list[int] = []
    killed: list[psutil.Process] = []
    async for chunk in stub.Complete(request(token_ids, max_tokens), timeout=SOON_S):
        found += [token for choice in chunk.choices for token in choice.token_ids]
        if len(found) >= 3 and not killed:
            killed = worker.children()
            for rank in killed:
                rank.kill()
    return found, killed


@pytest.fixture
def delivered(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Outcome]]:
    """What became of the parts that prefill's rank 0 has sent, and of those of the other rank."""
    ends: dict[str, list[Outcome]] = {"own": [], "other": []}
    take_own_end, take_end = SplitPush._take_own_end, SplitPush._take_end

    def note_own(push: SplitPush, part_idx: int, outcome: Outcome) -> None:
        ends["own"].append(outcome)
        take_own_end(push, part_idx, outcome)

    def note(push: SplitPush, outcome: Outcome) -> None:
        ends["other"].append(outcome)
        take_end(push, outcome)

    monkeypatch.setattr(SplitPush, "_take_own_end", note_own)
    monkeypatch.setattr(SplitPush, "_take_end", note)
    return ends


def wire_bytes(outcomes: list[Outcome]) -> int:
    assert all(isinstance(one, Delivered) for one in outcomes)
    return sum(one.wire_bytes for one in outcomes if isinstance(one, Delivered))


async def test_answers_as_one_process_does_and_outlives_a_killed_rank(
    tiny_models: dict[str, Path],
    redis_url: str,
    delivered: dict[str, list[Outcome]],
    tmp_path: Path,
) -> None:
    model = tiny_models["qwen2"]
    adapters = {"law": save_adapter(tmp_path, model)}
    alone = Winnow.load(model, kv_memory_bytes=1 << 26, adapters=adapters, **PRUNING)
    prompts = [prompt(num_tokens, seed=num_tokens) for num_tokens in (1, 33, 100, 300)]

    def expected(token_ids: list[int], max_tokens: int, adapter: str | None = None) -> list[int]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        return list(alone.generate(token_ids, sampling, adapter=adapter).token_ids)

    async with (
        two_rank_worker(model, redis_url, adapters) as worker,
        two_rank_prefill(model) as (prefill_model, prefill_ranks),
        running_service(
            model,
            redis_url,
            num_workers=0,
            prefill_model=prefill_model,
            prefill_ranks=prefill_ranks,
            namespace=NAMESPACE,
            pruning=PRUNING,
            adapters=adapters,
        ) as service,
        grpc.aio.insecure_channel(service.grpc_address) as channel,
    ):
        await until_ready(service, worker)
        stub = InferenceStub(channel)
        answers = await asyncio.gather(*(tokens_of(stub, one, 40) for one in prompts))
        assert answers == [expected(one, 40) for one in prompts]
        adapted = await asyncio.gather(*(tokens_of(stub, one, 40, "law") for one in prompts[2:]))
        assert adapted == [expected(one, 40, "law") for one in prompts[2:]]
        assert adapted != answers[2:]
        assert len(delivered["own"]) == len(delivered["other"]) == len(prompts) + len(adapted)
        assert wire_bytes(delivered["other"]) == pytest.approx(wire_bytes(delivered["own"]), 0.01)
        spare = DecodeWorker(service.settings)  # of one process; with less memory, so not chosen
        await spare.start()
        try:
            found, killed = await kill_in_mid_answer(
                stub, prompts[2], 300, psutil.Process(worker.pid)
            )
            assert found == expected(prompts[2], 300)
            assert len(killed) == 1
            async with asyncio.timeout(SOON_S):
                assert await worker.wait() == 1
        finally:
            await spare.stop()
