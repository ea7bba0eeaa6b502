"""Decode workers are restarted one after the other under load, and no request fails."""

import pytest

from tests.deploy.stack import Stack
from tests.load import NUM_CLIENTS, load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PROMPT = "The pass key is 48219. Remember it. 48219 is the pass key. " + "The grass is green. " * 60


def test_no_request_fails_while_workers_are_restarted(stack: Stack) -> None:
    with load(f"http://127.0.0.1:{stack.ports['gateway WINNOW_PORT']}/v1", PROMPT) as done:
        codes = [stack.restart(name) for name in ("decode-1", "decode-2")]
    assert codes == [0, 0]
    assert done.num_answered > NUM_CLIENTS
