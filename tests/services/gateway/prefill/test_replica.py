"""What a router knows of a replica, by its reports and by what was sent."""

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.jobs import PrefillJob
from services.common.routing_stats import RoutingStats
from services.gateway.prefill.order import Load, best_first
from services.gateway.prefill.replica import Addressing, Blocks, Replica
from winnow.pruning_settings import PruningSettings

MODEL = Addressing("model", 16)
LAG_S = 5.0
ACCEPT_S = 5.0


def job(num_tokens: int, request_id: str = "r", salt: str = "", first: int = 0) -> PrefillJob:
    """A prompt of the tokens `first`, 1, 2, ..."""
    token_ids = (first, *range(1, num_tokens))
    return PrefillJob(
        request_id, 1, token_ids, PruningSettings(), None, None, 20.0, cache_salt=salt
    )


def blocks(prompt: PrefillJob) -> Blocks:
    return {MODEL: MODEL.blocks(prompt)}


def report(*held: PrefillJob, work: dict[str, int] | None = None) -> dict[str, Any]:
    found = {block for prompt in held for block in MODEL.blocks(prompt)}
    return RoutingStats("model", 16, found, work or {}).to_dict()


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def known(clock: Clock) -> Replica:
    """That has reported."""
    known = Replica(clock)
    known.update(report())
    return known


def test_before_its_first_report_a_replica_holds_nothing_but_has_the_work_sent() -> None:
    known = Replica()
    known.update({})
    assert known.addressing is None
    known.send("call", job(100), blocks(job(100)))
    assert known.load(blocks(job(100))) == Load(0, [100])


def test_a_replica_holds_what_it_reports(known: Replica) -> None:
    known.update(report(job(100)))
    assert known.load(blocks(job(100))) == Load(96, [])
    assert known.load(blocks(job(40))) == Load(32, [])
    assert known.load(blocks(job(15))) == Load(0, [])
    assert known.load(blocks(job(100, first=7))) == Load(0, [])


def test_prompts_of_another_salt_or_model_are_not_held(known: Replica) -> None:
    known.update(report(job(100, salt="ours")))
    assert known.load(blocks(job(100, salt="ours"))).held_tokens == 96
    assert known.load(blocks(job(100, salt="theirs"))).held_tokens == 0
    other = replace(MODEL, fingerprint="other")
    assert known.load({other: other.blocks(job(100, salt="ours"))}).held_tokens == 0


@pytest.mark.parametrize(
    "without", [{"num_prompt_logprobs": 1}, {"pruning": PruningSettings(method="h2o")}], ids=str
)
def test_prompts_that_do_not_use_the_prefix_store_hold_nothing_and_leave_nothing(
    known: Replica, without: dict[str, Any]
) -> None:
    prompt = replace(job(100), **without)
    known.send("call", prompt, blocks(prompt))
    assert known.load(blocks(job(100))) == Load(0, [100])
    known.update(report(job(100)))
    assert known.load(blocks(prompt)) == Load(0, [100])


def test_the_beginning_counts_up_to_the_last_block_known_to_be_held(known: Replica) -> None:
    """A report of very many blocks leaves some out."""
    some = MODEL.blocks(job(100))[1:4:2]
    known.update(RoutingStats("model", 16, some, {}).to_dict())
    assert known.load(blocks(job(100))).held_tokens == 64


def test_what_was_sent_is_held_at_once_and_the_rest_of_it_is_work(known: Replica) -> None:
    known.update(report(job(48)))
    known.send("call", job(100), blocks(job(100)))
    assert known.load(blocks(job(200))) == Load(96, [52])


def test_what_has_ended_is_believed_until_reports_have_caught_up(
    known: Replica, clock: Clock
) -> None:
    known.send("call", job(100), blocks(job(100)))
    known.accept("call")
    clock.now_s = 100.0
    known.end("call")
    clock.now_s += LAG_S
    assert known.load(blocks(job(100))) == Load(96, [])
    clock.now_s += 0.1
    assert known.load(blocks(job(100))) == Load(0, [])
    known.update(report(job(100)))
    assert known.load(blocks(job(100))) == Load(96, [])


def test_what_was_not_sent_after_all_is_forgotten(known: Replica) -> None:
    known.send("other", job(48), blocks(job(48)))
    known.send("call", job(100), blocks(job(100)))
    known.forget("call")
    assert known.load(blocks(job(100))) == Load(48, [48])
    known.forget("call")
    known.end("call")


def test_what_is_never_accepted_was_cancelled_on_its_way(known: Replica, clock: Clock) -> None:
    for call_id in ("accepted", "cancelled"):
        known.send(call_id, job(100, call_id), blocks(job(100)))
    known.accept("accepted")
    clock.now_s = ACCEPT_S
    assert known.load({}).work == [100, 4]
    clock.now_s += 0.1
    assert known.load(blocks(job(100))) == Load(96, [100])


def test_work_of_other_gateways_is_known_by_reports(known: Replica) -> None:
    known.send("call", job(100, "ours"), blocks(job(100)))
    known.update(report(work={"ours": 60, "theirs": 500}))
    assert sorted(known.load({}).work) == [60, 500]


def test_a_report_from_before_the_end_of_our_prompt_does_not_bring_it_back(
    known: Replica, clock: Clock
) -> None:
    known.send("call", job(100, "ours"), blocks(job(100)))
    known.end("call")
    known.update(report(work={"ours": 60}))
    assert known.load({}).work == []
    clock.now_s += LAG_S + 1
    assert known.load({}).work == [60]  # it has been sent again, by another gateway


events = st.lists(
    st.tuples(
        st.sampled_from(["send", "accept", "end", "forget"]), st.integers(0, 5), st.integers(1, 90)
    )
)


@given(events=events)
def test_nothing_is_left_of_prompts_that_ended_or_were_not_sent(
    events: list[tuple[str, int, int]],
) -> None:
    clock = Clock()
    known = Replica(clock)
    known.update(report())
    for event, call, num_tokens in events:
        prompt = job(num_tokens, f"r{call}", first=call)
        if event == "send":
            known.forget(f"call{call}")
            known.send(f"call{call}", prompt, blocks(prompt))
        else:
            getattr(known, event)(f"call{call}")
        clock.now_s += 3
    for call in range(6):
        known.end(f"call{call}")
    clock.now_s += LAG_S + 1
    for call in range(6):
        assert known.load(blocks(job(90, first=call))) == Load(0, [])


def test_blocks_of_so_many_tokens_under_way_are_not_all_remembered(known: Replica) -> None:
    prompts = [job(16_000, f"r{idx}", first=idx) for idx in range(80)]
    for prompt in prompts:
        known.send(prompt.request_id, prompt, blocks(prompt))
    held = [known.load(blocks(prompt)).held_tokens for prompt in prompts]
    assert held == [16_000] * 65 + [0] * 15
    assert known.load({}).work == [16_000] * 80


def test_of_a_mix_of_questions_each_document_is_computed_once_and_both_replicas_work() -> None:
    """64 questions about 8 documents, 4 under way at a time; by chance 16 would compute one."""
    questions = [job(1_600, f"r{i}", first=i % 8) for i in range(64)]
    random.Random(1).shuffle(questions)
    replicas = [Replica(), Replica()]
    under_way: list[tuple[Replica, str]] = []
    computed = [0, 0]
    for replica in replicas:
        replica.update(report())
    for prompt in questions:
        loads = [replica.load(blocks(prompt)) for replica in replicas]
        chosen = best_first(1_600, loads)[0]
        computed[chosen] += loads[chosen].held_tokens == 0
        replicas[chosen].send(prompt.request_id, prompt, blocks(prompt))
        under_way.append((replicas[chosen], prompt.request_id))
        if len(under_way) == 4:
            replica, request_id = under_way.pop(0)
            replica.end(request_id)
    assert sum(computed) == 8
    assert min(computed) >= 2
