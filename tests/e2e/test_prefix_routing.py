"""Two prefill workers with a prefix store each: a later question finds the right one."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.winnow_process import FREE_PORTS, WinnowServe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

NUM_DOCUMENT_TOKENS = 256  # two blocks
FOUND_S = 60
_documents = itertools.count(1)


@pytest.fixture(scope="module")
def service(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WinnowServe]:
    workers = ("--prefill-replicas", "2", "--prefill-num-cpus", "0.3", "--decode-num-cpus", "0.3")
    memory = ("--prefix-cache-bytes", "64MiB", "--kv-memory-bytes", "64MiB", "--num-threads", "1")
    arguments = ["--model", str(tiny_models["qwen2"]), *FREE_PORTS, *workers, *memory]
    folder = tmp_path_factory.mktemp("serve")
    service = WinnowServe(folder, arguments, RAY_SERVE_USE_GRPC_BY_DEFAULT="1")
    service.wait_until_ready()
    yield service
    service.kill()


def cached_tokens(service: WinnowServe, document: int, question: int) -> int:
    """Tokens of the prompt that were not computed."""
    body: dict[str, Any] = {
        "model": "qwen2",
        "prompt": [document] * NUM_DOCUMENT_TOKENS + [question] * 40,
        "max_tokens": 1,
    }
    response = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_later_questions_find_the_worker_that_computed_the_document(service: WinnowServe) -> None:
    """Ten documents in a row, once both have reported; by chance it would be one in 2^20."""
    deadline_s = time.monotonic() + FOUND_S
    num_found = 0
    while num_found < 10:
        assert time.monotonic() < deadline_s
        document = next(_documents)
        cached = [cached_tokens(service, document, question) for question in range(3)]
        num_found = num_found + 1 if cached == [0, *[NUM_DOCUMENT_TOKENS] * 2] else 0
