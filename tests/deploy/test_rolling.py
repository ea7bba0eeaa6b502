"""Processes are restarted one after the other under load, and no request fails."""

import httpx
import pytest

from tests.deadlines import SOON_S
from tests.deploy.balancer import Balancer
from tests.deploy.stack import Stack
from tests.load import NUM_CLIENTS, load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

PROMPT = "The pass key is 48219. Remember it. 48219 is the pass key. " + "The grass is green. " * 60


def test_no_request_fails_while_workers_are_restarted(stack: Stack) -> None:
    with load(f"http://127.0.0.1:{stack.ports['gateway WINNOW_PORT']}/v1", PROMPT) as done:
        codes = [stack.restart(name) for name in ("decode-1", "decode-2")]
    assert codes == [0, 0]
    assert done.num_answered > NUM_CLIENTS


def test_no_request_fails_while_gateways_and_prefill_are_restarted(stack: Stack) -> None:
    stack.copy("gateway", "gateway-2")
    stack.start("gateway-2")
    stack.wait_until_healthy("gateway-2")

    def ports() -> list[int]:
        return [stack.ports[f"{name} WINNOW_PORT"] for name in ("gateway", "gateway-2")]

    with (
        Balancer(ports, _is_ready) as balancer,
        load(f"http://127.0.0.1:{balancer.port}/v1", PROMPT) as done,
    ):
        codes = [stack.restart(name) for name in ("gateway", "gateway-2")]
    assert codes == [0, 0]
    assert done.num_answered > NUM_CLIENTS


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=SOON_S).is_success
    except httpx.TransportError:
        return False
