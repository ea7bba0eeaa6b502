"""Clients that ask one request after the other, through OpenAI's own library."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai

NUM_CLIENTS = 2  # more would keep two cores from starting anything


class Load:
    """What the clients have done so far."""

    def __init__(self) -> None:
        self.num_answered = 0

    def ask_until(self, stopped: threading.Event, base_url: str, prompt: str) -> None:
        """Streamed answers of 80 tokens; raises for one that is not complete."""
        with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60) as client:
            model = client.models.list().data[0].id
            while not stopped.is_set():
                stream = client.completions.create(
                    model=model,
                    prompt=prompt,
                    max_tokens=80,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                chunks = [chunk.choices[0] for chunk in stream]
                assert chunks[-1].finish_reason == "length"
                self.num_answered += 1


@contextmanager
def load(base_url: str, prompt: str) -> Iterator[Load]:
    """Runs the clients while the block runs; raises what any of them met."""
    stopped, done = threading.Event(), Load()
    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        clients = [
            threads.submit(done.ask_until, stopped, base_url, prompt) for _ in range(NUM_CLIENTS)
        ]
        try:
            yield done
        finally:
            stopped.set()
        for client in clients:
            client.result()
