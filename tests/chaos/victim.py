"""The processes that the cases do harm to, and what is asked of them meanwhile."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import httpx
import openai
import psutil
import redis

from tests.chaos.holdings import Holdings, registered_pids
from tests.chaos.linked_stack import LinkedStack
from tests.deploy.stack import START_TIMEOUT_S
from tests.processes import title
from tests.services.exposed import samples, value
from winnow.v1 import decode_pb2 as pb
from winnow.v1.decode_pb2_grpc import DecodeStub

LEASE_S = 3.0
KV_LEASE_S = 45.0
REQUEST_TIMEOUT_S = 90.0
WORKERS = ("decode-1", "decode-2")
REPLICAS = {"gateway": ":Gateway", "prefill": ":Prefill"}  # and how Ray titles their processes
PROMPT = (
    "The pass key is 48219. Remember it. 48219 is the pass key. " + "The grass is green. " * 200
)
ONE_ANSWER: dict[str, Any] = {
    "model": "winnow-tiny",
    "prompt": PROMPT,
    "max_tokens": 200,
    "temperature": 0.8,
    "seed": 11,
    "stream": True,
    "ignore_eos": True,
}
# Still under way when a worker hears of a drain, and finds another place for it.
LONG_ANSWER = ONE_ANSWER | {"max_tokens": 600}
# Minutes of work: where nothing is held soon after these were asked for, they were broken off.
ENDLESS = ONE_ANSWER | {"n": 8, "max_tokens": 4000}
NUM_ENDLESS_TOKENS = 8 * 4000
DRAIN_TIMEOUT_S = 60.0
_SOON_S = 30.0
_PAUSE_S = 0.02
_T = TypeVar("_T")


@dataclass(frozen=True)
class Piece:
    """One event of a stream. at_s: time.monotonic() of its arrival."""

    text: str
    finish_reason: str | None
    at_s: float


def other_than(worker: str) -> str:
    (other,) = set(WORKERS) - {worker}
    return other


class NoReplica(Exception):
    """Ray has not started it again yet."""


class Victim:
    def __init__(self, stack: LinkedStack) -> None:
        self.stack = stack
        self.network = stack.network
        self.clocks = stack.clocks
        self._first_seen: dict[int, Holdings] = {}
        self._leaving: set[str] = set()
        self._connect()
        self._answers: dict[int, str] = {}
        self.quiet_s = self.learn(ONE_ANSWER)
        self.learn(LONG_ANSWER)

    def learn(self, body: Mapping[str, Any]) -> float:
        """Asks while nothing is amiss, so that `answer` is known; seconds to the first token."""
        started_s = time.monotonic()
        pieces = list(self.stream(body))
        self._answers[body["max_tokens"]] = "".join(piece.text for piece in pieces)
        return pieces[0].at_s - started_s

    def answer(self, body: Mapping[str, Any]) -> str:
        """What a quiet service answers; it was learnt before."""
        return self._answers[body["max_tokens"]]

    def _connect(self) -> None:
        self.url = f"http://127.0.0.1:{self.stack.ports['gateway WINNOW_PORT']}"
        self.admin_url = f"http://127.0.0.1:{self.stack.ports['gateway WINNOW_ADMIN_PORT']}"
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120
        )

    def restart_gateway(self) -> None:
        """With prefill and Ray; it is at another port then."""
        self.stack.restart("gateway")
        self._connect()

    def stream(self, body: Mapping[str, Any] = ONE_ANSWER) -> Iterator[Piece]:
        """What is asked for, as it comes."""
        given = dict(body)
        own = {"ignore_eos": given.pop("ignore_eos")}
        chunks: openai.Stream[Any] = self.openai.completions.create(**given, extra_body=own)
        with chunks:
            for chunk in chunks:
                choice = chunk.choices[0]
                yield Piece(choice.text, choice.finish_reason, time.monotonic())

    async def leave(self, reached: Callable[[], object]) -> None:
        """Asks for ENDLESS, and goes away when `reached` has returned."""

        async def read() -> None:
            async with httpx.AsyncClient(timeout=None) as client:
                url = f"{self.url}/v1/completions"
                async with client.stream("POST", url, json=ENDLESS) as answer:
                    async for _ in answer.aiter_bytes():
                        pass

        reading = asyncio.create_task(read())
        try:
            await asyncio.to_thread(reached)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def kill(self, name: str) -> None:
        """SIGKILL.  Ray starts the gateway and prefill again, `restore` the others."""
        self._process(name).kill()
        if name not in REPLICAS:
            self.stack.processes[name].wait()

    def drain(self, name: str) -> None:
        """SIGTERM; returns when it has ended in peace, and is started again by `restore`."""
        self.begin_drain(name)
        assert self.end_of_drain(name) == 0

    def begin_drain(self, name: str) -> None:
        """SIGTERM; `restore` waits for its end."""
        self.stack.processes[name].terminate()
        self._leaving.add(name)

    def end_of_drain(self, name: str) -> int:
        """Its exit code."""
        self._leaving.remove(name)
        return self.stack.processes[name].wait(DRAIN_TIMEOUT_S)

    def num_moves(self) -> int:
        """Prompts that went on at another worker with what the first one held."""
        return int(value(self._metrics(), "winnow_move_seconds_count"))

    def num_computed_anew(self) -> int:
        """Times that a prompt went on at another worker because the first one was lost."""
        return int(sum(samples(self._metrics())["winnow_migrations_total"].values()))

    def num_prefilled_anew(self) -> int:
        """Prefills that were tried again."""
        return int(value(self._metrics(), "winnow_prefill_retries_total"))

    def num_generated(self) -> int:
        """Tokens, by both workers since they were started."""
        ports = (self.stack.ports[f"{name} WINNOW_METRICS_PORT"] for name in WORKERS)
        texts = (httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text for port in ports)
        return sum(int(value(text, "winnow_decode_batch_size_sum")) for text in texts)

    def _metrics(self) -> str:
        return httpx.get(f"{self.admin_url}/metrics", timeout=10).text

    def stop(self, name: str) -> None:
        """SIGSTOP; it goes on with `restore`."""
        self._process(name).send_signal(signal.SIGSTOP)

    def _process(self, name: str) -> psutil.Process:
        """The one that does the work of that name; raises NoReplica."""
        if name in REPLICAS:
            return self.replica(name)
        return psutil.Process(self.stack.processes[name].pid)

    def restore(self) -> None:
        """Every process runs again, reaches the others, and is known to them."""
        self.network.heal()
        self.clocks.jump(0)
        for process in self.stack.processes.values():
            process.send_signal(signal.SIGCONT)
        for name in list(self._leaving):
            assert self.end_of_drain(name) in (0, -signal.SIGKILL)
        for name, process in self.stack.processes.items():
            if process.poll() is None:
                continue
            if name == "redis":
                self.stack.start_redis()
            else:
                self.stack.start(name)
        for name in REPLICAS:
            with contextlib.suppress(NoReplica, psutil.NoSuchProcess):  # it may end just now
                self.replica(name).send_signal(signal.SIGCONT)
        _soon(lambda: self._whole() or None, "the service is not whole again", START_TIMEOUT_S)

    def _whole(self) -> bool:
        """Whether the gateway finds prefill and decode, and the registry tells of nobody else."""
        try:
            workers = [self.stack.processes[name].pid for name in WORKERS]
            replicas = [self.replica(name).pid for name in REPLICAS]
            known = registered_pids(self.stack.ports["redis"])
            expected = {"worker": sorted(workers), "metrics": sorted(workers + replicas)}
            return known == expected and self.ready().get("decode_workers") == len(WORKERS)
        except (httpx.TransportError, redis.RedisError, NoReplica):
            return False

    def status(self, name: str) -> pb.StatusResponse:
        address = f"127.0.0.1:{self.stack.ports[f'{name} WINNOW_DECODE_PORT']}"
        with grpc.insecure_channel(address) as channel:
            return DecodeStub(channel).Status(pb.StatusRequest(), timeout=10)

    def generating(self) -> str:
        """The worker that generates now."""
        return self._worker_with("running_sequences")

    def admitting(self) -> str:
        """The worker that waits for KV now."""
        return self._worker_with("reserved_requests")

    def receiving(self) -> str:
        """The worker that takes KV now."""
        return self._worker_with("open_transfers")

    def wait_until_moved(self, num_moves: int) -> None:
        """Returns when so many prompts have moved."""
        _soon(lambda: self.num_moves() >= num_moves or None, "nothing moves")

    def wait_until_giving(self, name: str) -> None:
        """Returns when it has stopped generating, but still holds what it generated from."""

        def gives() -> bool:
            status = self.status(name)
            return not status.running_sequences and bool(status.pages_used)

        _soon(lambda: gives() or None, f"{name} gives nothing away")

    def _worker_with(self, what: str) -> str:
        return _soon(
            lambda: next((n for n in WORKERS if getattr(self.status(n), what)), None),
            f"no worker has {what}",
        )

    def held_back(self, link: str) -> str:
        """The worker that a silent link keeps something from."""
        links = self.network.links
        return _soon(
            lambda: next((n for n in WORKERS if links[f"{n} {link}"].num_held), None),
            f"nobody sends to a {link} port",
        )

    def ready(self) -> dict[str, Any]:
        """What the gateway says of itself."""
        return dict(httpx.get(f"{self.admin_url}/ready", timeout=10).json())

    def wait_until_waiting_for(self, leg: str) -> None:
        """Returns when a prompt waits for `admission` or `prefill`."""
        _soon(lambda: self._num_waiting_for(leg) or None, f"no prompt waits for {leg}")

    def _num_waiting_for(self, leg: str) -> float:
        return value(self._metrics(), "winnow_requests_waiting", reason=leg)

    def require_idle(self, timeout_s: float = 30) -> None:
        """Returns when no worker holds anything; raises with what one still holds."""
        deadline_s = time.monotonic() + timeout_s
        for name in WORKERS:
            while held := _held(self.status(name)):
                assert time.monotonic() < deadline_s, f"{name} still holds {held}"

    def require_as_before(self, timeout_s: float = 60) -> None:
        """Returns when no process holds more threads or sockets than when it was first seen."""
        for name, process in self.processes().items():
            before = self._first_seen.setdefault(process.pid, Holdings.of(process))
            deadline_s = time.monotonic() + timeout_s
            while not (now := Holdings.of(process)).is_within(before):
                assert time.monotonic() < deadline_s, f"{name} holds {now}, before {before}"
                time.sleep(_PAUSE_S)

    def sizes(self) -> list[tuple[str, int, int]]:
        """Name, pid and memory in bytes of each process that serves requests and lives."""
        found = []
        for name in (*WORKERS, *REPLICAS):
            with contextlib.suppress(NoReplica, psutil.NoSuchProcess):
                process = self._process(name)
                found.append((name, process.pid, process.memory_info().rss))
        return found

    def log_bytes(self) -> int:
        """The sizes of the decode workers' logs."""
        return sum(self.stack.log(name).stat().st_size for name in WORKERS)

    def created_s(self) -> int:
        """When an answer says that it was made."""
        answer = self.openai.completions.create(model="winnow-tiny", prompt="Yes", max_tokens=1)
        return answer.created

    def processes(self) -> dict[str, psutil.Process]:
        """Those that serve requests, by name."""
        return {name: self._process(name) for name in (*WORKERS, *REPLICAS)}

    def logging(self) -> Iterator[psutil.Process]:
        """All processes of Python: Winnow's and Ray's."""
        yield from (self._process(name) for name in WORKERS)
        service = psutil.Process(self.stack.processes["gateway"].pid)
        yield from (p for p in service.children(recursive=True) if title(p).startswith("ray::"))

    def replica(self, name: str) -> psutil.Process:
        """Ray's process of the gateway or of prefill; raises NoReplica."""
        service = psutil.Process(self.stack.processes["gateway"].pid)
        for process in service.children(recursive=True):
            if REPLICAS[name] in title(process):
                return process
        raise NoReplica(name)


@contextlib.contextmanager
def running_victim(services: dict[str, Any], folder: Path) -> Iterator[Victim]:
    """The Compose services, with short leases."""
    stack = LinkedStack(
        services,
        folder,
        WINNOW_LEASE_S=str(LEASE_S),
        WINNOW_KV_LEASE_S=str(KV_LEASE_S),
        WINNOW_REQUEST_TIMEOUT_S=str(REQUEST_TIMEOUT_S),
        WINNOW_MAX_WAITING_PREFILLS="16",
        OMP_NUM_THREADS="1",
    )
    try:
        stack.start_all()
        yield Victim(stack)
    finally:
        stack.stop()


def _soon(look: Callable[[], _T | None], otherwise: str, timeout_s: float = _SOON_S) -> _T:
    """What `look` sees, once it sees something."""
    deadline_s = time.monotonic() + timeout_s
    while (seen := look()) is None:
        assert time.monotonic() < deadline_s, otherwise
        time.sleep(_PAUSE_S)
    return seen


def _held(status: pb.StatusResponse) -> dict[str, int]:
    names = ("running_sequences", "reserved_requests", "pages_used", "pages_reserved")
    held = {name: getattr(status, name) for name in (*names, "open_transfers")}
    return {name: count for name, count in held.items() if count}
