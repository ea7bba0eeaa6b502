"""Two prefill workers with a prefix store each: a later question finds the right one."""

import itertools
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.winnow_process import FREE_PORTS, WinnowServe
from tests.processes import title
from tests.services.exposed import value
from winnow import BatchJob, SamplingParams, Winnow

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

NUM_DOCUMENT_TOKENS = 256  # two blocks
STORE_BYTES = 2 << 20  # of some five documents
FOUND_S = 60
NUM_REQUESTS, NUM_CLIENTS, NUM_ANSWER_TOKENS = 200, 4, 4
KILLED_AFTER = (60, 130)  # answers
METHODS = ("full", "snapkv", "fastkv", "asl", "gemfilter", "h2o")
BUDGETS: dict[str, Any] = {"select_tokens": 64, "kv_budget": 48}
_documents = itertools.count(1)


@pytest.fixture(scope="module")
def service(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WinnowServe]:
    workers: tuple[str, ...] = (
        "--prefill-replicas",
        "2",
        "--prefill-num-cpus",
        "0.3",
        "--decode-num-cpus",
        "0.3",
    )
    memory = ("--prefix-cache-bytes", str(STORE_BYTES), "--kv-memory-bytes", "64MiB")
    workers += ("--num-threads", "1")
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


def test_prompts_are_answered_as_by_one_process_while_workers_are_killed(
    service: WinnowServe, tiny_models: dict[str, Path]
) -> None:
    """Documents that fill the store over and over, by all methods; nothing is held at the end."""
    alone = Winnow.load(tiny_models["qwen2"], kv_memory_bytes=64 << 20)
    sampling = SamplingParams(max_tokens=NUM_ANSWER_TOKENS, temperature=0, ignore_eos=True)
    rng = random.Random(0)
    jobs = [
        BatchJob(
            _prompt(rng), replace(alone.pruning, method=rng.choice(METHODS), **BUDGETS), sampling
        )
        for _ in range(NUM_REQUESTS)
    ]
    expected = [next(alone.generate_many([job])).completion.text for job in jobs]
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        asked = [clients.submit(_answer, service, job) for job in jobs]
        for num_answers in KILLED_AFTER:
            asked[num_answers].result()
            _kill_a_prefill_worker(service)
        assert [answer.result() for answer in asked] == expected
    _require_nothing_held(service)


def _prompt(rng: random.Random) -> list[int]:
    document = rng.randrange(20)
    length = NUM_DOCUMENT_TOKENS + rng.randrange(-40, 150)
    tokens = random.Random(document).choices(range(20, 300), k=length)
    return tokens + rng.choices(range(20, 300), k=rng.randrange(1, 60))


def _answer(service: WinnowServe, job: BatchJob) -> str:
    body: dict[str, Any] = {
        "model": "qwen2",
        "prompt": job.token_ids,
        "max_tokens": NUM_ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "winnow": BUDGETS | {"method": job.pruning.method},
    }
    response = httpx.post(f"{service.url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def _kill_a_prefill_worker(service: WinnowServe) -> None:
    next(one for one in service.processes() if ":Prefill" in title(one)).kill()


def _require_nothing_held(service: WinnowServe) -> None:
    """In both workers, as soon as the killed one is back."""
    deadline_s = time.monotonic() + FOUND_S
    while True:
        texts = _prefill_metrics(service)
        held = [value(text, "winnow_prefix_blocks_in_use") for text in texts]
        if held == [0, 0]:
            break
        assert time.monotonic() < deadline_s, held
        time.sleep(0.5)
    assert all(value(text, "winnow_prefix_resident_bytes") <= STORE_BYTES for text in texts)
    assert any(value(text, "winnow_prefix_evicted_blocks_total") > 0 for text in texts)


def _prefill_metrics(service: WinnowServe) -> list[str]:
    """Of those that answer: a killed worker's record stays until its lease ends."""
    groups = httpx.get(f"{service.admin_url()}/metrics/targets", timeout=20).json()
    texts = []
    for group in groups:
        if group["labels"]["__winnow_role"] == "prefill":
            try:
                url = f"http://{group['targets'][0]}/metrics"
                texts.append(httpx.get(url, timeout=20).text)
            except httpx.TransportError:
                continue
    return texts
