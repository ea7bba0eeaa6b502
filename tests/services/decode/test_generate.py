import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.common.messages import (
    grammar_to_proto,
    recompression_to_proto,
    sampling_to_proto,
)
from services.common.rpc import ERROR_KEY, PARAM_KEY
from services.decode.worker import DecodeWorker
from tests.services.decode.client import GREEDY, PROMPT, Client, error_of, events_of, token_ids_of
from tests.services.decode.conftest import StartWorker
from tests.winnow.drive import admit, decode_all, ids, make_engine, spec
from winnow.errors import InvalidSetting, ModelMismatch, Overloaded
from winnow.grammar import Grammar
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import SamplingParams
from winnow.tokenizer import load_tokenizer
from winnow.v1 import decode_pb2 as pb
from winnow.wire import WIRE_VERSIONS

pytestmark = pytest.mark.asyncio(loop_scope="module")


def expected_ids(
    worker: DecodeWorker, sampling: SamplingParams, sequence_idx: int = 0
) -> list[int]:
    """The engine's own answer to PROMPT, without any service around it."""
    engine = make_engine(worker.engine.model)
    admit(engine, spec("alone", len(PROMPT), sampling, num_sequences=sequence_idx + 1), PROMPT)
    return ids(decode_all(engine)["alone"], sequence_idx)


async def test_streams_the_engines_tokens(client: Client) -> None:
    call = await client.admit(client.request())
    receipt = await client.push(client.frames())
    assert receipt.num_layers == client.worker.engine.model.shape.num_layers
    assert await token_ids_of(call) == expected_ids(client.worker, GREEDY)
    assert await call.code() is grpc.StatusCode.OK


async def test_admitted_tells_where_the_kv_goes_and_comes_before_any_kv(client: Client) -> None:
    call = client.generate(client.request())
    admitted = (await call.read()).admitted
    assert admitted.kv_address == client.worker.kv_address
    assert admitted.worker_id == client.worker.worker_id
    assert admitted.lease_s == 120
    assert admitted.reserved_pages == client.worker.engine.stats().pool.pages_reserved > 0
    call.cancel()


async def test_prefilled_comes_once_and_carries_the_report(client: Client) -> None:
    call = await client.admit(client.request())
    await client.push(client.frames(attempt=3))
    events = [event async for event in events_of(call)]
    assert [event.WhichOneof("event") for event in events] == ["prefilled", *["tokens"] * 8]
    assert events[0].prefilled.attempt == 3
    assert events[0].prefilled.report.num_prompt_tokens == len(PROMPT)
    finish = [token.finish_reason for event in events for token in event.tokens.tokens]
    assert finish == [pb.FINISH_REASON_UNSPECIFIED] * 7 + [pb.FINISH_REASON_LENGTH]


async def test_sequences_of_one_prompt_sample_with_their_own_seeds(client: Client) -> None:
    sampling = replace(GREEDY, temperature=1.0, seed=7, num_logprobs=2)
    request = client.request(num_sequences=2, sampling=sampling_to_proto(sampling))
    call = await client.admit(request)
    await client.push(client.frames())
    tokens = [token async for event in events_of(call) for token in event.tokens.tokens]
    for idx in range(2):
        ours = [token.token_id for token in tokens if token.sequence_idx == idx]
        assert ours == expected_ids(client.worker, sampling, idx)
    assert all(token.logprob < 0 and len(token.top_logprobs) == 2 for token in tokens)


async def test_sixteen_requests_at_once_each_get_their_own_tokens(client: Client) -> None:
    async def one(idx: int) -> list[int]:
        call = await client.admit(client.request(f"r{idx}"))
        await client.push(client.frames(f"r{idx}", token_ids=prompts[idx]))
        return await token_ids_of(call)

    prompts = [tuple(range(idx + 1, idx + 1 + len(PROMPT))) for idx in range(16)]
    answers = await asyncio.gather(*(one(idx) for idx in range(16)))
    engine = make_engine(client.worker.engine.model)
    for idx, prompt in enumerate(prompts):
        admit(engine, spec(f"r{idx}", len(prompt), GREEDY), prompt)
    alone = decode_all(engine)
    assert list(answers) == [ids(alone[f"r{idx}"]) for idx in range(16)]


async def test_recompression_is_counted(client: Client) -> None:
    pruning = PruningSettings(
        method="full",
        window_size=8,
        kernel_size=3,
        decode_budget=16,
        recompress_interval=8,
    )
    call = await client.admit(
        client.request(recompression=recompression_to_proto(pruning.decode_side))
    )
    await client.push(client.frames(pruning=pruning))
    events = [event async for event in events_of(call)]
    assert events[-1].tokens.recompressed_entries > 0


async def test_an_answer_keeps_to_the_requests_grammar(
    client: Client, tiny_models: dict[str, Path]
) -> None:
    sampling = replace(GREEDY, ignore_eos=False, temperature=1.0, max_tokens=30)
    grammar = grammar_to_proto(Grammar("regex", "(yes|no){3}"))
    request = client.request(sampling=sampling_to_proto(sampling), grammar=grammar)
    call = await client.admit(request)
    await client.push(client.frames())
    *tokens, end = await token_ids_of(call)
    assert end in client.worker.engine.model.eos_token_ids
    text = load_tokenizer(tiny_models["llama"]).decode(tokens)
    assert re.fullmatch("(yes|no){3}", text)


@pytest.mark.parametrize(
    ("grammar", "param", "message"),
    [
        (pb.Grammar(json_schema='{"items": {"not": {}}}'), "grammar.items", "cannot be enforced"),
        (pb.Grammar(lark="start: <|end|>"), "grammar", "names the token <|end|>"),
        (pb.Grammar(), "grammar", "no kind that is known here"),
    ],
)
async def test_a_grammar_that_cannot_be_compiled_is_refused_before_anything_is_reserved(
    client: Client, grammar: pb.Grammar, param: str, message: str
) -> None:
    sampling = sampling_to_proto(replace(GREEDY, ignore_eos=False))
    call = client.generate(client.request(sampling=sampling, grammar=grammar))
    error = await error_of(call)
    assert (error.code, error.param) == ("invalid_grammar", param)
    assert message in error.message
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    await client.until_idle()


async def test_a_grammar_needs_its_end_token(client: Client) -> None:
    grammar = pb.Grammar(regex="a")
    error = await error_of(client.generate(client.request(grammar=grammar)))
    assert (error.code, error.param) == ("invalid_value", "ignore_eos")


async def test_cancelling_before_the_kv_came_frees_all_pages(client: Client) -> None:
    call = await client.admit(client.request())
    call.cancel()
    await client.until_idle()


async def test_cancelling_mid_stream_frees_all_pages(client: Client) -> None:
    sampling = sampling_to_proto(replace(GREEDY, max_tokens=4000))
    call = await client.admit(client.request(sampling=sampling))
    await client.push(client.frames())
    while not (await call.read()).tokens.tokens:
        pass
    assert client.worker.engine.stats().pool.pages_used > 0
    call.cancel()
    await client.until_idle()


async def test_a_deadline_frees_all_pages(client: Client) -> None:
    call = client.generate(client.request(), timeout_s=0.3)
    assert (await error_of(call)).code == "deadline_exceeded"
    await client.until_idle()


async def test_an_id_can_be_used_again_when_its_request_ended(client: Client) -> None:
    for _ in range(2):
        call = await client.admit(client.request())
        await client.push(client.frames())
        assert await token_ids_of(call) == expected_ids(client.worker, GREEDY)


async def test_an_id_in_use_is_refused(client: Client) -> None:
    first = await client.admit(client.request())
    error = await error_of(client.generate(client.request()))
    assert isinstance(error, InvalidSetting)
    assert "admitted already" in error.message
    first.cancel()


async def test_another_models_prompt_is_refused(client: Client) -> None:
    call = client.generate(client.request(model_fingerprint="other"))
    assert isinstance(await error_of(call), ModelMismatch)
    assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_no_memory_now_is_resource_exhausted(start_worker: StartWorker) -> None:
    worker = await start_worker(kv_memory_bytes=1 << 20, kv_overcommit=1)
    async with Client(worker) as client:
        sampling = sampling_to_proto(replace(GREEDY, max_tokens=600))
        admitted = await client.admit(client.request(sampling=sampling))
        call = client.generate(client.request("r2", sampling=sampling))
        error = await error_of(call)
        assert isinstance(error, Overloaded)
        assert "KV pages" in error.message
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        admitted.cancel()
        await client.until_idle()
        again = await client.admit(client.request("r2", sampling=sampling))
        again.cancel()
        await client.until_idle()


async def test_no_place_in_the_batch_is_resource_exhausted(start_worker: StartWorker) -> None:
    worker = await start_worker(max_batch_size=1)
    async with Client(worker) as client:
        admitted = await client.admit(client.request())
        error = await error_of(client.generate(client.request("r2")))
        assert isinstance(error, Overloaded)
        admitted.cancel()
        await client.until_idle()


async def test_what_can_never_fit_is_invalid(start_worker: StartWorker) -> None:
    worker = await start_worker(kv_memory_bytes=1 << 20)
    async with Client(worker) as client:
        sampling = sampling_to_proto(replace(GREEDY, max_tokens=8000))
        error = await error_of(client.generate(client.request(sampling=sampling)))
        assert isinstance(error, InvalidSetting)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"request_id": "no spaces"}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"num_prompt_tokens": 0}, "prompt tokens"),
        ({"num_prompt_tokens": 100_000}, "prompt tokens"),
        ({"num_sequences": 0}, "n"),
        ({"num_sequences": 1000}, "n"),
        ({"max_prompt_entries": 0}, "max_prompt_entries"),
        ({"max_prompt_entries": 41}, "max_prompt_entries"),
        ({"prompt_token_ids": [1, 2]}, "prompt_token_ids"),
        ({"sampling": pb.SamplingParams(max_tokens=0)}, "max_tokens"),
        ({"sampling": pb.SamplingParams(max_tokens=1, top_p=1, temperature=3)}, "temperature"),
        ({"recompression": pb.Recompression(window_size=0, kernel_size=3)}, "window_size"),
        ({"recompression": pb.Recompression(window_size=8, kernel_size=4)}, "kernel_size"),
        (
            {"sampling": sampling_to_proto(replace(GREEDY, logit_bias={99_999: 1.0}))},
            "logit_bias",
        ),
        (
            {"sampling": sampling_to_proto(replace(GREEDY, stop_token_ids=frozenset({99_999})))},
            "stop_token_ids",
        ),
        ({"sampling": pb.SamplingParams(max_tokens=1, min_tokens=2, top_p=1)}, "min_tokens"),
        (
            {"sampling": sampling_to_proto(replace(GREEDY, repetition_penalty=2))},
            "prompt_token_ids",
        ),
    ],
)
async def test_fields_out_of_range_are_refused_by_name(
    client: Client, changes: dict[str, Any], param: str
) -> None:
    call = client.generate(client.request(**({"request_id": "r1"} | changes)))
    error = await error_of(call)
    assert isinstance(error, InvalidSetting)
    assert error.param == param
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    metadata = dict(await call.trailing_metadata())
    assert (metadata[ERROR_KEY], metadata[PARAM_KEY]) == ("invalid_value", param)


async def test_a_penalty_on_the_prompt_gets_the_prompt(client: Client) -> None:
    sampling = replace(GREEDY, repetition_penalty=2.0)
    request = client.request(sampling=sampling_to_proto(sampling), prompt_token_ids=PROMPT)
    call = await client.admit(request)
    await client.push(client.frames())
    engine = make_engine(client.worker.engine.model)
    alone = spec("alone", len(PROMPT), sampling, prompt_token_ids=PROMPT)
    admit(engine, alone, PROMPT)
    assert await token_ids_of(call) == ids(decode_all(engine)["alone"])


async def test_status_tells_what_is_held(client: Client) -> None:
    call = await client.admit(client.request())
    status = await client.status()
    assert status.worker_id == client.worker.worker_id
    assert status.model_fingerprint == client.worker.engine.model.fingerprint
    assert tuple(status.wire_versions) == WIRE_VERSIONS
    assert (status.reserved_requests, status.running_sequences) == (1, 0)
    assert status.pages_total > status.pages_reserved > status.pages_used == 0
    assert status.page_size == 16
    assert not status.draining
    call.cancel()
