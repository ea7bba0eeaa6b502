"""A share of pruned requests is computed unpruned too, in idle time, and what agrees is counted."""

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from services.gateway.quality import checks
from tests.deadlines import SOON_S
from tests.services.gateway.quality.service import (
    COMPLETIONS,
    NUM_TOKENS,
    PRUNING,
    ask,
    body,
    complete,
    count,
    num_over,
    outcome,
    prompt,
    until,
    until_over,
)
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from tests.winnow import reference
from winnow.errors import Overloaded, PrefillFailed
from winnow.v1 import inference_pb2 as pb

COUNTED = (
    "quality_first_tokens_total",
    "quality_first_tokens_agreed_total",
    "quality_answers_total",
    "quality_answers_agreed_total",
    "quality_tokens_agreed_ratio_sum",
    "quality_first_kl_nats_sum",
)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_QUIET_S", 0.05)
    monkeypatch.setattr(checks, "_AGAIN_S", 0.05)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks begin late enough for a test to do something before, once its requests are over."""
    monkeypatch.setattr(checks, "_QUIET_S", 1.0)


def sampling_service(model_path: Path, redis_url: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {"pruning": PRUNING, "quality_sample": 1.0}
    return running_service(model_path, redis_url, **(settings | changes))


def counted(service: TestService, task: str = "other") -> dict[str, float]:
    return {name: count(service, name, task=task) for name in COUNTED}


async def test_what_agrees_is_what_an_unpruned_run_gives(model_path: Path, redis_url: str) -> None:
    """With budgets from absurd to nearly all, and with a cut after the last layer."""
    budgets: list[dict[str, Any]] = [{"kv_budget": budget} for budget in (9, 32, 64, 90, 95)]
    late = {"method": "fastkv", "fixed_layer": 3, "select_tokens": 32, "compression": "none"}
    agreed = []
    async with sampling_service(model_path, redis_url) as service:
        for num_checks, settings in enumerate([*budgets, late], start=1):
            token_ids = prompt(num_checks)
            before = counted(service)
            told = await ask(service, token_ids, logprobs=0, winnow=settings)
            await until_over(service, num_checks)
            gained = {name: now - before[name] for name, now in counted(service).items()}
            assert gained["quality_answers_total"] == gained["quality_first_tokens_total"] == 1
            whole = await ask(service, token_ids, logprobs=0, winnow={"method": "full"})
            answers = [one["choices"][0]["logprobs"]["tokens"] for one in (told, whole)]
            same = [pruned == unpruned for pruned, unpruned in zip(*answers, strict=True)]
            assert gained["quality_answers_agreed_total"] == all(same)
            assert gained["quality_first_tokens_agreed_total"] == same[0]
            first_wrong = [*same, False].index(False)
            assert gained["quality_tokens_agreed_ratio_sum"] * len(same) >= first_wrong - 1e-6
            agreed.append(all(same))
        assert not agreed[0] and agreed[-1]
        assert outcome(service, "done") == len(agreed)


async def test_the_share_of_tokens_is_that_under_the_answer_itself(
    model_path: Path, redis_url: str
) -> None:
    """At each place the unpruned model goes on from the pruned answer, not from its own."""
    model = reference.load(model_path)
    async with (
        sampling_service(model_path, redis_url) as service,
        grpc.aio.insecure_channel(service.grpc_address) as channel,
    ):
        request = pb.CompleteRequest(
            model=MODEL_NAME,
            token_ids=pb.TokenIds(ids=prompt()),
            max_tokens=8,
            temperature=0,
            ignore_eos=True,
            winnow=pb.WinnowOptions(kv_budget=9),
        )
        chunks = await complete(channel, request)
        answer = [i for chunk in chunks for choice in chunk.choices for i in choice.token_ids]
        await until_over(service, 1)
        likeliest = [
            reference.greedy(model, prompt() + answer[:position], 1)[0] for position in range(8)
        ]
        share = sum(a == b for a, b in zip(answer, likeliest, strict=True)) / 8
        assert counted(service)["quality_tokens_agreed_ratio_sum"] == pytest.approx(share)
        assert share < 1


async def test_the_divergence_tells_little_pruning_from_much(
    model_path: Path, redis_url: str
) -> None:
    divergences: list[float] = []
    async with sampling_service(model_path, redis_url) as service:
        for budget in (NUM_TOKENS - 1, 9):
            before = counted(service)["quality_first_kl_nats_sum"]
            await ask(service, winnow={"kv_budget": budget})
            await until_over(service, len(divergences) + 1)
            divergences.append(counted(service)["quality_first_kl_nats_sum"] - before)
    # The first token comes from prefill, which SnapKV computes whole: it diverges by nothing.
    assert divergences == pytest.approx([0, 0], abs=1e-4)


async def test_a_cut_before_the_last_layer_shows_in_the_first_token(
    model_path: Path, redis_url: str
) -> None:
    cut = {"method": "fastkv", "fixed_layer": 0, "select_tokens": 9}
    async with sampling_service(model_path, redis_url, pruning=PRUNING | cut) as service:
        for seed in range(4):
            await ask(service, prompt(seed), max_tokens=1)
        await until_over(service, 4)
        found = counted(service)
        assert found["quality_first_tokens_total"] == 4
        assert found["quality_first_tokens_agreed_total"] < 4
        assert found["quality_first_kl_nats_sum"] / 4 > 0.1


async def test_nothing_is_sampled_unless_the_operator_says_so(
    model_path: Path, redis_url: str
) -> None:
    async with sampling_service(model_path, redis_url, quality_sample=0) as service:
        await ask(service)
        await asyncio.sleep(0.3)
        assert len(service.prefiller.jobs) == 1
        assert num_over(service) == 0
        assert set(counted(service).values()) == {0}


async def test_a_share_is_sampled(model_path: Path, redis_url: str) -> None:
    async with sampling_service(model_path, redis_url, quality_sample=0.5) as service:
        await asyncio.gather(*(ask(service, prompt(seed), max_tokens=1) for seed in range(40)))
        await until(lambda: not service.gateway._checks._waiting)
        assert 5 < outcome(service, "done") < 35  # outside once in a million times


@pytest.mark.parametrize(
    "changes",
    [
        {"winnow": {"method": "full"}},
        {"winnow": {"kv_budget": NUM_TOKENS}},
        {"prompt": list(range(5, 20))},
        {"max_tokens": 0, "echo": True, "logprobs": 1},
    ],
    ids=["full", "budget of all", "short prompt", "nothing generated"],
)
async def test_what_was_not_pruned_is_not_checked(
    model_path: Path, redis_url: str, changes: dict[str, Any]
) -> None:
    async with sampling_service(model_path, redis_url) as service:
        await ask(service, changes.pop("prompt", None), **changes)
        await asyncio.sleep(0.2)
        assert len(service.prefiller.jobs) == 1


async def test_what_decode_cuts_is_checked_too(model_path: Path, redis_url: str) -> None:
    """Its prompt was not pruned in prefill."""
    cut = {"method": "full", "decode_budget": 24, "recompress_interval": 2}
    async with sampling_service(model_path, redis_url) as service:
        told = await ask(service, winnow=cut)
        assert told["usage"]["winnow"]["recompressed_entries"] > 0
        await until_over(service, 1)
        assert outcome(service, "done") == 1


async def test_clients_see_the_log_probabilities_that_they_asked_for(
    model_path: Path, redis_url: str
) -> None:
    async with (
        sampling_service(model_path, redis_url) as service,
        grpc.aio.insecure_channel(service.grpc_address) as channel,
    ):
        assert (await ask(service))["choices"][0]["logprobs"] is None
        for number in (0, 2):
            (choice,) = (await ask(service, logprobs=number))["choices"]
            assert {len(top) for top in choice["logprobs"]["top_logprobs"]} == {number}
        chat = await service.openai.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": "the quick brown fox " * 20}],
            max_tokens=3,
            logprobs=True,
            top_logprobs=1,
        )
        assert chat.choices[0].logprobs is not None
        assert {len(t.top_logprobs) for t in chat.choices[0].logprobs.content or ()} == {1}
        request = pb.CompleteRequest(
            model=MODEL_NAME, token_ids=pb.TokenIds(ids=prompt()), max_tokens=3
        )
        chunks = await complete(channel, request)
        assert not any(choice.logprobs for chunk in chunks for choice in chunk.choices)
        await until_over(service, 5)


async def test_sampled_answers_count_by_their_first_token_alone(
    model_path: Path, redis_url: str
) -> None:
    shaped: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 1},
        {"logit_bias": {"7": 5}},
        {"repetition_penalty": 1.2},
    ]
    async with sampling_service(model_path, redis_url) as service:
        for changes in shaped:
            await ask(service, **changes)
        await until_over(service, len(shaped))
        found = counted(service)
        assert found["quality_first_tokens_total"] == len(shaped)
        assert found["quality_first_tokens_agreed_total"] == len(shaped)
        assert found["quality_answers_total"] == 0
        jobs = [job for job in service.prefiller.jobs if job.gives_way]
        assert {len(job.token_ids) for job in jobs} == {NUM_TOKENS + 1}


async def test_every_prompt_counts_once_however_many_its_choices(
    model_path: Path, redis_url: str
) -> None:
    async with sampling_service(model_path, redis_url) as service:
        await ask(service, [prompt(1), prompt(2)], n=2)
        await until_over(service, 2)
        assert counted(service)["quality_answers_total"] == 2


async def test_an_answer_ends_at_its_stop_string_in_the_check_too(
    model_path: Path, redis_url: str
) -> None:
    async with sampling_service(model_path, redis_url) as service:
        plain = (await ask(service, n=2))["choices"][0]["text"]
        stopped = await ask(service, n=2, stop=[plain[1:3]])
        assert stopped["choices"][0]["finish_reason"] == "stop"
        await until_over(service, 2)
        first, second = (job for job in service.prefiller.jobs if job.gives_way)
        assert NUM_TOKENS < len(second.token_ids) < len(first.token_ids) == NUM_TOKENS + 6


async def test_a_check_is_one_unpruned_prefill_that_nobody_is_charged_for(
    model_path: Path, redis_url: str
) -> None:
    async with sampling_service(model_path, redis_url) as service:
        await ask(service)
        await until_over(service, 1)
        job = service.prefiller.jobs[-1]
        assert (job.pruning.method, job.kv_address, job.scored_from) == ("full", None, 95)
        for name in ("requests_received_total", "requests_admitted_total", "ttft_seconds_count"):
            assert count(service, name) == 1
        assert count(service, "prompt_tokens_total") == NUM_TOKENS
        assert count(service, "requests_finished_total", reason="length") == 1
        assert count(service, "requests_waiting", reason="prefill") == 0


@pytest.mark.usefixtures("late")
async def test_a_request_that_arrives_stops_a_check_which_is_done_later(
    model_path: Path, redis_url: str
) -> None:
    async with sampling_service(model_path, redis_url) as service:
        prefiller = service.prefiller
        await ask(service)
        prefiller.hold_jobs()
        await asyncio.wait_for(prefiller.asked.wait(), SOON_S)
        assert prefiller.jobs[-1].gives_way
        arriving = asyncio.create_task(ask(service, prompt(1)))
        await asyncio.wait_for(prefiller.cancelled.wait(), SOON_S)
        await until(lambda: len(prefiller.jobs) == 3)
        await asyncio.sleep(0.3)  # as long as a request runs, none is begun
        assert [job.gives_way for job in prefiller.jobs] == [False, True, False]
        prefiller.hold.set()
        await arriving
        await until_over(service, 2)
        assert outcome(service, "done") == 2
        assert prefiller.jobs[3].token_ids == prefiller.jobs[1].token_ids


@pytest.mark.usefixtures("late")
async def test_a_busy_prefill_worker_is_asked_again(model_path: Path, redis_url: str) -> None:
    async with sampling_service(model_path, redis_url) as service:
        service.prefiller.failures += [Overloaded("busy")] * 2
        service.prefiller.hold_jobs()
        asking = asyncio.create_task(ask(service))
        await asyncio.wait_for(service.prefiller.asked.wait(), SOON_S)
        failures, service.prefiller.failures = service.prefiller.failures, []
        service.prefiller.hold.set()
        await asking
        service.prefiller.failures = failures
        await until_over(service, 1)
        assert outcome(service, "done") == 1
        assert [job.gives_way for job in service.prefiller.jobs] == [False, True, True, True]


@pytest.mark.usefixtures("late")
async def test_a_check_that_fails_is_counted_and_others_go_on(
    model_path: Path, redis_url: str
) -> None:
    async with sampling_service(model_path, redis_url) as service:
        for seed in range(3):
            await ask(service, prompt(seed))
        service.prefiller.failures += [PrefillFailed("it broke"), RuntimeError("a bug")]
        await until_over(service, 3)
        assert (outcome(service, "failed"), outcome(service, "done")) == (2, 1)
        assert len(service.prefiller.jobs) == 6


@pytest.mark.usefixtures("late")
async def test_the_oldest_are_dropped_where_too_many_wait(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "MAX_WAITING", 2)
    async with sampling_service(model_path, redis_url) as service:
        for seed in range(5):
            await ask(service, prompt(seed))
        await until_over(service, 5)
        assert (outcome(service, "dropped"), outcome(service, "done")) == (3, 2)
        checked = [job.token_ids[:NUM_TOKENS] for job in service.prefiller.jobs if job.gives_way]
        assert checked == [tuple(prompt(3)), tuple(prompt(4))]


async def test_requests_that_do_not_end_well_are_not_checked(
    model_path: Path, redis_url: str
) -> None:
    async with sampling_service(model_path, redis_url, prefill_attempts=1) as service:
        service.prefiller.failures.append(PrefillFailed("it broke"))
        assert (await service.http.post(COMPLETIONS, json=body(prompt()))).status_code == 502
        async with service.http.stream(
            "POST", COMPLETIONS, json=body(prompt(), stream=True, max_tokens=500)
        ) as left:
            assert left.status_code == 200
        await service.until_idle()
        await asyncio.sleep(0.2)
        assert not any(job.gives_way for job in service.prefiller.jobs)


@pytest.mark.usefixtures("late")
async def test_checks_end_with_the_gateway(model_path: Path, redis_url: str) -> None:
    async with sampling_service(model_path, redis_url) as service:
        prefiller = service.prefiller
        await asyncio.gather(*(ask(service, prompt(seed)) for seed in range(3)))
        prefiller.hold_jobs()
        await asyncio.wait_for(prefiller.asked.wait(), SOON_S)
        async with asyncio.timeout(SOON_S):
            await service.gateway.close()
        assert prefiller.cancelled.is_set()
        assert (outcome(service, "dropped"), outcome(service, "done")) == (3, 0)
        prefiller.hold.set()
        await ask(service)
        await asyncio.sleep(0.2)
        assert [job.gives_way for job in prefiller.jobs].count(True) == 1


async def test_tasks_of_the_operators_are_told_apart(model_path: Path, redis_url: str) -> None:
    async with (
        sampling_service(model_path, redis_url, quality_tasks="qa, summary") as service,
        grpc.aio.insecure_channel(service.grpc_address) as channel,
    ):
        for task in ("qa", "somebody's own", None):
            await ask(service, winnow={"task": task})
        request = pb.CompleteRequest(
            model=MODEL_NAME,
            token_ids=pb.TokenIds(ids=prompt()),
            max_tokens=3,
            temperature=0,
            winnow=pb.WinnowOptions(task="summary"),
        )
        assert await complete(channel, request)
        await until_over(service, 4)
        found = {task: counted(service, task) for task in ("qa", "summary", "other")}
        totals = {task: values["quality_answers_total"] for task, values in found.items()}
        assert totals == {"qa": 1, "summary": 1, "other": 2}
        assert count(service, "quality_answers_total", task="somebody's own") == 0


async def test_an_answer_that_fills_the_context_is_not_checked(
    model_path: Path, redis_url: str
) -> None:
    """A prefill takes no prompt of that length."""
    async with sampling_service(model_path, redis_url, max_model_len=NUM_TOKENS + 6) as service:
        await ask(service, max_tokens=6)
        await ask(service, max_tokens=5)
        await until_over(service, 1)
        await asyncio.sleep(0.2)
        assert (outcome(service, "done"), outcome(service, "failed")) == (1, 0)
