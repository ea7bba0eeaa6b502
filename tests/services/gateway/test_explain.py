"""`winnow.explain` through the whole service: what was dropped of a prompt, and by which scores."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from services.common.jobs import PrefillJob, PrefillOutcome
from tests.services.gateway.grpc_requests import request
from tests.services.gateway.service import MODEL_NAME, TestService
from winnow import Winnow
from winnow.engine.prefill import PrefillRun
from winnow.engine.score_watch import ScoreWatch
from winnow.token_scores import TokenScores
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "the quick brown fox jumps over the lazy dög – 漢字 " * 6
PRUNING: dict[str, Any] = {
    "method": "fastkv",
    "fixed_layer": 1,
    "select_tokens": 48,
    "kv_budget": 32,
    "window_size": 8,
}
BODY: dict[str, Any] = {
    "model": MODEL_NAME,
    "prompt": TEXT,
    "max_tokens": 6,
    "temperature": 0,
    "ignore_eos": True,
    "winnow": PRUNING | {"explain": True},
}
PHASES = ["admission", "queue", "prefill", "transfer", "first token", "decode"]


async def _explained(service: TestService, **changes: Any) -> dict[str, Any]:
    response = await service.http.post("/v1/completions", json=BODY | changes)
    assert response.status_code == 200, response.text
    return dict(response.json()["usage"]["winnow"])


def _expected(model_path: Path) -> TokenScores:
    winnow = Winnow.load(model_path, **PRUNING)
    token_ids = winnow.tokenizer.encode(TEXT)
    watch = ScoreWatch(winnow.pruning, len(token_ids), winnow.model.shape)
    run = PrefillRun(winnow.model, token_ids, winnow.pruning, watch, is_long=False)
    for _ in run.layers():
        pass
    return watch.result()


async def test_tells_each_token_s_score_and_last_layer(
    service: TestService, model_path: Path
) -> None:
    usage = await _explained(service)
    told, expected = usage["explain"], _expected(model_path)
    assert "".join(told["pieces"]) == TEXT
    assert told["layer"] == usage["selection_layer"] == 1
    assert told["last_layers"] == expected.last_layers.tolist()
    scores, window = told["scores"][:-8], told["scores"][-8:]
    assert scores == pytest.approx(expected.scores.tolist(), rel=6e-3)
    assert window == [None] * 8
    assert sum(layer > 1 for layer in told["last_layers"]) == usage["selected_tokens"] == 48
    assert (told["num_layers"], len(told["layer_entries"]), told["window_size"]) == (4, 4, 8)
    assert told["layer_entries_full"] == [len(told["pieces"]) * told["num_kv_heads"]] * 4
    assert sum(told["layer_bytes"]) == usage["kv_bytes_kept"]


async def test_the_timeline_runs_from_arrival_to_the_last_token(service: TestService) -> None:
    usage = await _explained(service)
    spans = usage["explain"]["timeline"]
    assert [span["name"] for span in spans] == PHASES
    assert all(0 <= span["start_s"] <= span["end_s"] for span in spans)
    by_name = {span["name"]: span for span in spans}
    for before, after in pairwise(["admission", "queue", "prefill"]):
        assert by_name[before]["end_s"] == by_name[after]["start_s"]
    assert by_name["first token"]["end_s"] == by_name["decode"]["start_s"] == usage["ttft_s"]
    assert usage["explain"]["tokens_per_s"] > 0


async def test_a_stream_tells_it_in_its_last_chunk(service: TestService) -> None:
    body = BODY | {"stream": True, "stream_options": {"include_usage": True}}
    lines = (await service.http.post("/v1/completions", json=body)).text.split("\n\n")
    last = json.loads(lines[-3].removeprefix("data: "))
    assert "".join(last["usage"]["winnow"]["explain"]["pieces"]) == TEXT


async def test_grpc_tells_the_same(service: TestService) -> None:
    told = (await _explained(service))["explain"]
    options = pb.WinnowOptions(**PRUNING, explain=True)
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        complete = InferenceStub(channel).Complete(request(text=TEXT, winnow=options), timeout=60)
        *_, last = [chunk async for chunk in complete]
    explain = last.usage.explain
    for name in ("pieces", "last_layers", "layer_entries", "layer_entries_full", "layer_bytes"):
        assert list(getattr(explain, name)) == told[name]
    for name in ("layer", "num_layers", "num_kv_heads", "window_size"):
        assert getattr(explain, name) == told[name]
    assert list(explain.scores[:-8]) == pytest.approx(told["scores"][:-8])
    assert all(math.isnan(score) for score in explain.scores[-8:])
    assert [span.name for span in explain.timeline] == PHASES


async def test_nothing_is_told_unless_it_is_asked(service: TestService) -> None:
    assert "explain" not in await _explained(service, winnow=PRUNING)


async def test_an_older_prefill_worker_s_answer_has_none(
    service: TestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = service.prefiller.prefill

    async def without_scores(job: PrefillJob) -> PrefillOutcome:
        return replace(await prefill(job), scores=None)

    monkeypatch.setattr(service.prefiller, "prefill", without_scores)
    assert (await _explained(service))["explain"] is None


async def test_a_whole_prompt_is_told_too(service: TestService) -> None:
    told = (await _explained(service, winnow={"method": "full", "explain": True}))["explain"]
    assert told["layer"] == 3
    assert set(told["last_layers"]) == {3}


async def test_a_prompt_that_is_only_scored_is_told_too(service: TestService) -> None:
    options = {"echo": True, "max_tokens": 0, "logprobs": 1, "winnow": {"explain": True}}
    told = (await _explained(service, **options))["explain"]
    assert [span["name"] for span in told["timeline"]] == PHASES[:4]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "two prompts": ({"prompt": ["a", "b"]}, "the request has 2 prompts; the limit is 1"),
    "stream": ({"stream": True}, "a stream needs stream_options.include_usage"),
}


@pytest.mark.parametrize("case", BAD)
async def test_refuses_what_it_cannot_explain(case: str, service: TestService) -> None:
    changes, message = BAD[case]
    response = await service.http.post("/v1/completions", json=BODY | changes)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "winnow.explain")
    assert message in error["message"]


async def test_refuses_a_prompt_with_too_many_tokens_to_tell_of(
    service: TestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.request.request.MAX_EXPLAINED_TOKENS", 100)
    response = await service.http.post("/v1/completions", json=BODY)
    assert response.status_code == 400
    assert "tokens; the limit is 100" in response.json()["error"]["message"]
