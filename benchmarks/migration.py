"""Migration benchmark: moving a running sequence's KV to another decode worker, against replay.

Runs two decode workers and a prefill engine with all their gRPC servers in one process. A prompt is
prefilled into the first worker and generates some tokens. Then, in turn: the second worker fetches
its KV (as when a worker drains), or the prompt is prefilled again into the second worker, which
replays the tokens (as when a worker is killed). Reports the median time from the request to the
second worker until its first new token. The floor of a move is the time a raw socket takes to
carry the sequence's bytes, measured in the same run.
"""

import asyncio
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.report import arguments, show, write_json
from benchmarks.shapes import model_path
from services.common.jobs import PrefillJob
from services.common.redis_registry import RedisRegistry
from services.common.settings_sources import load_settings
from services.decode.worker import DecodeWorker
from services.gateway.request.generate_call import GenerateCall, PromptRequest, open_generate_call
from services.gateway.request.routing import Router
from services.prefill.metrics import PrefillMetrics
from services.prefill.queue import PrefillQueue
from winnow.decoder import DecoderModel
from winnow.defaults import pruning_defaults
from winnow.model_files import ModelDescription, describe_model
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import SamplingParams

NUM_GENERATED = 64
MAX_TOKENS = 4 * NUM_GENERATED  # so the sequence is still running when it is migrated
SAMPLING = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
TIMEOUT_S = 1800.0
FULL = PruningSettings(method="full", compression="none", kv_budget=None)


@dataclass
class Bench:
    workers: list[DecodeWorker]
    prefill: PrefillQueue
    model: DecoderModel
    description: ModelDescription
    router: Router

    async def begin(self, request: PromptRequest) -> tuple[GenerateCall, list[int]]:
        """Start the request on the worker with the most room; read NUM_GENERATED tokens."""
        call = await open_generate_call(self.router, request, self.description, TIMEOUT_S)
        await self.prefill_into(call, request)
        return call, await read_tokens(call, NUM_GENERATED)

    async def prefill_into(self, call: GenerateCall, request: PromptRequest) -> None:
        job = PrefillJob(
            request_id=request.request_id,
            attempt=1,
            token_ids=request.token_ids,
            pruning=request.pruning,
            kv_address=call.kv_address,
            ticket=call.grant.ticket(1),
            deadline_s=TIMEOUT_S,
            trace_context="",
        )
        await asyncio.wrap_future(self.prefill.submit(job))

    async def move(self, request: PromptRequest) -> tuple[float, int]:
        """Migrate by moving KV.  Returns seconds to the first new token, and the KV's bytes."""
        old, _ = await self.begin(request)
        (holder,) = (w for w in self.workers if w.worker_id == old.worker_id)
        num_bytes = holder.engine.stats().pool.kv_bytes_used
        asked = replace(request, request_id=f"{request.request_id}.m", origin=old.origin)
        start = time.perf_counter()
        new = await open_generate_call(self.router, asked, self.description, TIMEOUT_S)
        await read_tokens(new, 1)
        seconds = time.perf_counter() - start
        assert new.worker_id != old.worker_id
        await self.end(old, new)
        return seconds, num_bytes

    async def replay(self, request: PromptRequest) -> float:
        """Migrate by replay.  Returns seconds to the first new token; the first call is closed."""
        old, tokens = await self.begin(request)
        asked = replace(request, request_id=f"{request.request_id}.r", replayed=(tuple(tokens),))
        old.close()
        start = time.perf_counter()
        new = await open_generate_call(self.router, asked, self.description, TIMEOUT_S)
        prefilling = asyncio.create_task(self.prefill_into(new, asked))
        await read_tokens(new, 1)
        seconds = time.perf_counter() - start
        await prefilling
        await self.end(new)
        return seconds

    async def end(self, *calls: GenerateCall) -> None:
        for call in calls:
            call.close()
        for worker in self.workers:
            await worker.admission.wait_until_idle(10)


async def read_tokens(call: GenerateCall, count: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count:
        event = await call.next_event()
        assert event is not None
        tokens += [token.token_id for token in event.tokens.tokens]
    return tokens


def socket_seconds(num_bytes: int) -> float:
    """Seconds to send `num_bytes` over one loopback TCP connection into one reused buffer."""
    payload = bytes(1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        receiver = threads.submit(_receive, listener, num_bytes)
        with socket.create_connection(listener.getsockname()) as connection:
            start = time.perf_counter()
            for at in range(0, num_bytes, len(payload)):
                connection.sendall(memoryview(payload)[: num_bytes - at])
            receiver.result()
            return time.perf_counter() - start


def _receive(listener: socket.socket, num_bytes: int) -> None:
    buffer = bytearray(1 << 20)
    connection, _ = listener.accept()
    with connection:
        while num_bytes > 0:
            num_bytes -= connection.recv_into(buffer)


@contextmanager
def running_redis() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/redis.sock"
        command = ["redis-server", "--port", "0", "--unixsocket", path, "--save", ""]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not Path(path).exists():
                time.sleep(0.01)
            yield f"unix://{path}"
        finally:
            server.terminate()
            server.wait()


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[Bench]:
    with running_redis() as redis_url:
        settings = load_settings(
            {"model": str(path), "redis_url": redis_url, "kv_memory_bytes": "2GiB"}
        )
        workers = [DecodeWorker(settings) for _ in range(2)]
        for worker in workers:
            await worker.start()
        model, description = load_model(path), describe_model(path)
        prefill = PrefillQueue(
            model,
            PrefillMetrics("bench"),
            max_waiting=8,
            max_open=1,
            num_threads=torch.get_num_threads(),
        )
        prefill.start()
        registry = RedisRegistry(redis_url, settings.namespace)
        router = Router(registry, description.fingerprint)
        try:
            yield Bench(workers, prefill, model, description, router)
        finally:
            await router.close()
            await registry.close()
            await asyncio.to_thread(prefill.stop)
            for worker in workers:
                await worker.stop()


async def compare(name: str, path: Path, num_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row per cache setting."""
    rows: list[dict[str, Any]] = []
    async with running(path) as bench:
        defaults = pruning_defaults(bench.description)
        for cache, pruning in (("pruned", defaults), ("unpruned", FULL)):
            moves, replays, num_bytes = list[float](), list[float](), 0
            for seed in range(rounds):
                torch.manual_seed(seed)
                token_ids = torch.randint(5, 1000, (num_tokens,)).tolist()
                request = PromptRequest(f"{cache}-{seed}", tuple(token_ids), 1, SAMPLING, pruning)
                seconds, num_bytes = await bench.move(request)
                moves.append(seconds)
                replays.append(await bench.replay(request))
            rows.append(
                {
                    "model": name,
                    "prompt tokens": num_tokens,
                    "cache": cache,
                    "KV MB": num_bytes / 1e6,
                    "move ms": median(moves) * 1e3,
                    "floor ms": median(socket_seconds(num_bytes) for _ in range(5)) * 1e3,
                    "replay ms": median(replays) * 1e3,
                    "times faster": median(replays) / median(moves),
                }
            )
    return rows


def main() -> None:
    options = arguments("moving a running prompt beside computing it anew").parse_args()
    plan = [("tiny", 7_680)] if options.quick else [("tiny", 7_680), ("0.5b", 8_192)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, num_tokens in plan:
            path = model_path(name, Path(folder))
            rows += asyncio.run(compare(name, path, num_tokens, 3))
    notes = [f"{NUM_GENERATED} tokens generated before; the aim is 5 times faster at 8k tokens"]
    show("Migration", rows, notes)
    write_json(options.json, "migration", rows)


if __name__ == "__main__":
    main()
