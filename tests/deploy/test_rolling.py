"""Decode workers are restarted one after the other under load, and no request fails."""

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.deploy.stack import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

NUM_CLIENTS = 4
PROMPT = "The pass key is 48219. Remember it. 48219 is the pass key. " + "The grass is green. " * 60


def _ask_until(stopped: threading.Event, base_url: str) -> int:
    """Streamed answers, one after the other; how many were complete."""
    num_answered = 0
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60) as client:
        while not stopped.is_set():
            stream = client.completions.create(
                model="winnow-tiny",
                prompt=PROMPT,
                max_tokens=80,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            chunks = [chunk.choices[0] for chunk in stream]
            assert chunks[-1].finish_reason == "length"
            num_answered += 1
    return num_answered


def test_no_request_fails_while_workers_are_restarted(stack: Stack) -> None:
    base_url = f"http://127.0.0.1:{stack.ports['gateway WINNOW_PORT']}/v1"
    stopped = threading.Event()
    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        clients = [threads.submit(_ask_until, stopped, base_url) for _ in range(NUM_CLIENTS)]
        try:
            codes = [stack.restart(name) for name in ("decode-1", "decode-2")]
        finally:
            stopped.set()
        answered = [client.result() for client in clients]
    assert codes == [0, 0]
    assert min(answered) > 0
