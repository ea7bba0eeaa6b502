"""The processes that the cases do harm to, and what is asked of them meanwhile."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import openai
import psutil

from tests.deploy.stack import Stack
from winnow.v1 import decode_pb2 as pb
from winnow.v1.decode_pb2_grpc import DecodeStub

LEASE_S = 3.0
WORKERS = ("decode-1", "decode-2")
PROMPT = (
    "The pass key is 48219. Remember it. 48219 is the pass key. " + "The grass is green. " * 200
)
NUM_TOKENS = 400


@dataclass(frozen=True)
class Piece:
    """One event of a stream. at_s: time.monotonic() of its arrival."""

    text: str
    finish_reason: str | None
    at_s: float


class Victim:
    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        port = stack.ports["gateway WINNOW_PORT"]
        self.openai = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120
        )
        self.expected = "".join(piece.text for piece in self.stream())

    def stream(self) -> Iterator[Piece]:
        """One answer of NUM_TOKENS tokens, as it comes."""
        chunks = self.openai.completions.create(
            model="winnow-tiny",
            prompt=PROMPT,
            max_tokens=NUM_TOKENS,
            temperature=0.8,
            seed=11,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with chunks:
            for chunk in chunks:
                choice = chunk.choices[0]
                yield Piece(choice.text, choice.finish_reason, time.monotonic())

    def kill(self, name: str) -> None:
        """SIGKILL; it is started again by `restore`."""
        self.stack.processes[name].kill()
        self.stack.processes[name].wait()

    def stop(self, name: str) -> None:
        """SIGSTOP; it goes on with `restore`."""
        self.stack.processes[name].send_signal(signal.SIGSTOP)

    def restore(self) -> None:
        """Every process runs again."""
        for name, process in self.stack.processes.items():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
            elif name == "redis":
                self.stack.start_redis()
            else:
                self.stack.start(name)
        self.stack.wait_until_healthy("gateway", *WORKERS)

    def status(self, name: str) -> pb.StatusResponse:
        address = f"127.0.0.1:{self.stack.ports[f'{name} WINNOW_DECODE_PORT']}"
        with grpc.insecure_channel(address) as channel:
            return DecodeStub(channel).Status(pb.StatusRequest(), timeout=10)  # type: ignore[no-any-return, no-untyped-call]

    def generating(self) -> str:
        """The worker that generates now."""
        while True:
            for name in WORKERS:
                if self.status(name).running_sequences:
                    return name

    def admitting(self) -> str:
        """The worker that waits for KV now."""
        while True:
            for name in WORKERS:
                if self.status(name).reserved_requests:
                    return name

    def require_idle(self, timeout_s: float = 30) -> None:
        """Returns when no worker holds anything; raises with what one still holds."""
        deadline_s = time.monotonic() + timeout_s
        for name in WORKERS:
            while held := _held(self.status(name)):
                assert time.monotonic() < deadline_s, f"{name} still holds {held}"

    def replica(self, deployment: str) -> psutil.Process:
        """Ray's process of a Serve deployment."""
        gateway = psutil.Process(self.stack.processes["gateway"].pid)
        found = [p for p in gateway.children(recursive=True) if deployment in _title(p)]
        assert found, f"no replica of {deployment}"
        return found[0]

    def kill_replica(self, deployment: str) -> None:
        os.kill(self.replica(deployment).pid, signal.SIGKILL)


def _held(status: pb.StatusResponse) -> dict[str, int]:
    names = ("running_sequences", "reserved_requests", "pages_used", "pages_reserved")
    held = {name: getattr(status, name) for name in (*names, "open_transfers")}
    return {name: count for name, count in held.items() if count}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
