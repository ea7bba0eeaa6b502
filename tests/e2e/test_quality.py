"""Checks of quality in a real service: through Ray, in idle time, and to no end but its own."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deadlines import SOON_S
from tests.e2e.winnow_process import FREE_PORTS, WinnowServe
from tests.services.exposed import value

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PRUNING = ("method=snapkv", "window_size=8", "kv_budget=64")
NUM_TOKENS = 4000


@pytest.fixture
def service(tiny_models: dict[str, Path], tmp_path: Path) -> Iterator[WinnowServe]:
    flags = [flag for change in PRUNING for flag in ("--pruning", change)]
    model = ["--model", str(tiny_models["llama"]), "--quality-sample", "1"]
    service = WinnowServe(tmp_path, [*model, *FREE_PORTS, *flags])
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.kill()


def ask(http: httpx.Client, number: int) -> None:
    prompt = [5 + (number + idx * idx) % 300 for idx in range(NUM_TOKENS)]
    body = {"model": "llama", "prompt": prompt, "max_tokens": 2, "temperature": 0}
    answer = http.post("/v1/completions", json=body | {"winnow": {"task": "qa"}})
    assert answer.is_success, answer.text


def test_checks_give_way_to_requests_and_end_with_the_service(service: WinnowServe) -> None:
    def over(outcome: str) -> float:
        text = httpx.get(f"{service.admin_url()}/metrics", timeout=SOON_S).text
        return value(text, "winnow_quality_checks_total", outcome=outcome)

    with httpx.Client(base_url=service.url, timeout=SOON_S) as http:
        ask(http, 0)
        for number in (1, 2):
            time.sleep(0.55)  # by then the check of the one before has begun
            ask(http, number)
        until_s = time.monotonic() + SOON_S
        while over("done") < 3:
            assert time.monotonic() < until_s
            time.sleep(0.1)
        assert (over("failed"), over("dropped")) == (0, 0)
        for number in (3, 4):
            ask(http, number)
    assert service.press_ctrl_c() == 0
    assert service.left() == []
    log = service.stderr.read_text()
    assert log.count("checked: ") >= 3
    assert "Traceback" not in log
