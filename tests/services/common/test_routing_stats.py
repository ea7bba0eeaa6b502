"""What a prefill worker reports to routers."""

import json

from hypothesis import given
from hypothesis import strategies as st

from services.common.routing_stats import RoutingStats, short_hash
from winnow.engine.prefix.hashes import block_hashes, prefix_salt

MAX_REPORT_BYTES = 64 << 10


def stats(num_blocks: int) -> RoutingStats:
    hashes = block_hashes(range(num_blocks), prefix_salt("model"), 1)
    return RoutingStats("model", 1, list(map(short_hash, hashes)), {"r": 7})


@given(num_blocks=st.integers(0, 300))
def test_a_report_says_what_the_worker_said(num_blocks: int) -> None:
    sent = stats(num_blocks)
    received = RoutingStats.from_dict(sent.to_dict())
    assert received.blocks == frozenset(sent.blocks)
    assert (received.fingerprint, received.block_tokens) == ("model", 1)
    assert received.work == {"r": 7}


def test_a_report_has_plain_types() -> None:
    report = stats(3).to_dict()
    assert len(report.pop("blocks")) == 3 * 8
    json.dumps(report)


def test_a_report_of_very_many_blocks_is_bounded_and_tells_of_all_prompts() -> None:
    sent = stats(50_000)
    report = sent.to_dict()
    assert len(report["blocks"]) <= MAX_REPORT_BYTES
    received = RoutingStats.from_dict(report).blocks
    in_order = list(sent.blocks)
    for start in range(0, 50_000 - 8, 8):  # of eight blocks in a row
        assert any(block in received for block in in_order[start : start + 8])
