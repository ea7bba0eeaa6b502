"""LoRA adapters through the whole service, beside the model's own answers."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
import pytest_asyncio

from services.gateway import metrics
from services.gateway.request.load_adapter import load_on_workers
from services.gateway.request.routing import Router
from services.gateway.request.states import State
from tests.services.exposed import value
from tests.services.gateway.grpc_requests import request
from tests.services.gateway.request.prompt_runs import (
    REQUEST,
    answers,
    make_run,
    parts_of,
    worker_of,
)
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from tests.winnow import reference
from tests.winnow.adapters.made import merged, save_adapter
from tests.winnow.drive import prompt
from winnow.errors import UnusableAdapter
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_NEW = 12
PROMPT = prompt(150, seed=3)
NAMES = (MODEL_NAME, "first", "second")


@pytest.fixture(scope="module")
def folders(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "first": save_adapter(root / "first", model_path, rank=4),
        "second": save_adapter(
            root / "second", model_path, rank=2, seed=2, targets=("q_proj", "down_proj")
        ),
        "third": save_adapter(root / "third", model_path, rank=3, seed=3),
    }


@pytest.fixture(scope="module")
def expected(model_path: Path, folders: dict[str, Path]) -> dict[str, list[int]]:
    """The greedy continuation of PROMPT by transformers, by the names of models."""
    networks = {name: merged(model_path, folder) for name, folder in folders.items()}
    networks[MODEL_NAME] = reference.load(model_path)
    return {name: reference.greedy(one, PROMPT, NUM_NEW) for name, one in networks.items()}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    model_path: Path, redis_url: str, folders: dict[str, Path]
) -> AsyncIterator[TestService]:
    named = {name: folders[name] for name in ("first", "second")}
    async with running_service(
        *(model_path, redis_url), num_workers=2, adapters=named, prefix_cache_bytes=8 << 20
    ) as service:
        yield service
        await service.until_idle()


async def ask(service: TestService, model: str, **changes: Any) -> httpx.Response:
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": NUM_NEW,
        "temperature": 0,
        "ignore_eos": True,
    }
    return await service.http.post("/v1/completions", json=body | changes)


async def answer(service: TestService, model: str, **changes: Any) -> list[list[int]]:
    """The token ids of each choice."""
    asked = request(model=model, token_ids=pb.TokenIds(ids=PROMPT), max_tokens=NUM_NEW, **changes)
    choices: dict[int, list[int]] = {}
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        async for chunk in InferenceStub(channel).Complete(asked):
            for delta in chunk.choices:
                choices.setdefault(delta.index, []).extend(delta.token_ids)
    return [choices[idx] for idx in sorted(choices)]


async def load(service: TestService, name: str, folder: Path | str) -> httpx.Response:
    return await service.admin.post("/adapters", json={"name": name, "folder": str(folder)})


async def test_rows_of_two_adapters_and_of_the_model_are_decoded_together(
    service: TestService, expected: dict[str, list[int]]
) -> None:
    asked = NAMES * 2
    got = await asyncio.gather(*(answer(service, name, n=2) for name in asked))
    assert got == [[expected[name]] * 2 for name in asked]
    assert len({tuple(expected[name]) for name in asked}) == len(NAMES)


async def test_a_rest_request_names_an_adapter(
    service: TestService, expected: dict[str, list[int]]
) -> None:
    decode = service.gateway.model.tokenizer.decode
    for name in NAMES:
        told = (await ask(service, name)).raise_for_status().json()
        assert told["model"] == name
        text = decode(expected[name], skip_special_tokens=True)
        assert told["choices"][0]["text"][:5] == text[:5]


async def test_prefixes_are_not_shared_between_adapters(service: TestService) -> None:
    document = prompt(300, seed=9)

    async def cached(name: str) -> int:
        told = (await ask(service, name, prompt=document)).json()["usage"]
        return int(told["prompt_tokens_details"]["cached_tokens"])

    assert [await cached(name) for name in NAMES * 2] == [0, 0, 0, 256, 256, 256]


async def test_models_and_metrics_list_adapters(service: TestService) -> None:
    listed = (await service.http.get("/v1/models")).json()["data"]
    assert [(card["id"], card.get("parent")) for card in listed] == [
        (MODEL_NAME, None),
        ("first", MODEL_NAME),
        ("second", MODEL_NAME),
    ]
    card = (await service.http.get("/v1/models/first")).json()
    assert (card["id"], card["parent"]) == ("first", MODEL_NAME)
    before = (await service.admin.get("/metrics")).text
    await ask(service, "first")
    after = (await service.admin.get("/metrics")).text
    for name, more in (
        ("requests", 1),
        ("prompt_tokens", len(PROMPT)),
        ("generated_tokens", NUM_NEW),
    ):
        counts = [
            value(text, f"winnow_adapter_{name}_total", adapter="first") for text in (before, after)
        ]
        assert counts[1] - counts[0] == more


async def test_an_unknown_name_is_refused_with_those_that_are_served(service: TestService) -> None:
    refused = await ask(service, "third")
    assert refused.status_code == 404
    told = "model 'third' is not served here; served is 'tiny', 'first', 'second'"
    assert refused.json()["error"]["message"] == told


async def test_adapters_are_loaded_and_dropped_while_the_service_runs(
    service: TestService, folders: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    loaded = await load(service, "third", folders["third"])
    assert loaded.status_code == 200
    assert (loaded.json()["rank"], loaded.json()["modules"]) == (3, 28)
    # There are slots for two: one of the others gives way, and comes back.
    for name in ("third", "first", "second", "third"):
        assert await answer(service, name) == [expected[name]]
    names = [one["name"] for one in (await service.admin.get("/adapters")).json()]
    assert names == ["first", "second", "third"]
    assert (await service.admin.delete("/adapters/third")).status_code == 204
    assert (await ask(service, "third")).status_code == 404
    assert (await service.admin.delete("/adapters/third")).status_code == 404


async def test_a_dropped_adapter_finishes_what_runs(
    service: TestService, folders: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    await load(service, "third", folders["third"])
    service.prefiller.hold_jobs()
    asked = asyncio.create_task(answer(service, "third"))
    await service.prefiller.asked.wait()
    assert (await service.admin.delete("/adapters/third")).status_code == 204
    service.prefiller.hold.set()
    assert await asked == [expected["third"]]


async def test_a_changed_folder_is_another_adapter(
    service: TestService, model_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changing"
    save_adapter(folder, model_path, rank=4, seed=4)
    await load(service, "changing", folder)
    save_adapter(folder, model_path, rank=4, seed=5)
    for name in ("first", "second"):  # take its slots
        await answer(service, name, n=2)
    refused = await ask(service, "changing")
    assert refused.status_code in (502, 503)
    assert refused.json()["error"]["code"] in ("prefill_failed", "no_decode_worker")
    await load(service, "changing", folder)
    whole = reference.greedy(merged(model_path, folder), PROMPT, NUM_NEW)
    assert await answer(service, "changing") == [whole]
    await service.admin.delete("/adapters/changing")


async def test_refuses_to_load_what_cannot_be_served(
    service: TestService, model_path: Path, tmp_path: Path
) -> None:
    wide = save_adapter(tmp_path / "wide", model_path, rank=5)
    for name, folder, told in (
        ("wide", wide, "adapter wide has rank 5; the limit is max_adapter_rank 4"),
        (MODEL_NAME, wide, "adapter tiny has a name of the model itself"),
        ("far", "relative", "folder 'relative' is relative; workers need an absolute path"),
        ("none", tmp_path / "none", f"adapter none: folder {tmp_path}/none does not exist"),
    ):
        refused = await load(service, name, folder)
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == told


async def test_a_worker_that_finds_another_adapter_in_the_folder_refuses(
    service: TestService,
) -> None:
    ref = service.gateway.adapters.find("first")
    assert ref is not None
    model = service.gateway.model.description
    router = Router(service.registry, model.fingerprint)
    with pytest.raises(UnusableAdapter, match=r"has digest .* here; the request's has 0000"):
        await load_on_workers(router, replace(ref, digest="0000"), model)
    await router.close()


async def test_a_run_keeps_its_adapter_when_its_worker_is_lost(
    service: TestService, model_path: Path, redis_url: str, folders: dict[str, Path]
) -> None:
    """By a new prefill and replayed tokens; a draining worker's KV is fetched with the adapter."""
    async with (
        running_service(
            *(model_path, redis_url), num_workers=3, adapters={"first": folders["first"]}
        ) as several,
        parts_of(several) as parts,
    ):
        ref = several.gateway.adapters.find("first")
        sampling = replace(REQUEST.sampling, max_tokens=200, temperature=0.8)
        asked = replace(REQUEST, adapter=ref, num_sequences=2, sampling=sampling)
        whole = await answers(several, make_run(parts, asked))
        own = await answers(several, make_run(parts, replace(asked, adapter=None)))
        assert own != whole
        drains: list[asyncio.Task[int]] = []

        async def drain(service: TestService, run: Any) -> None:
            drains.append(asyncio.create_task(worker_of(service, run).drain(60)))

        run = make_run(parts, asked)
        assert await answers(several, run, harm_after=20, harm=drain) == whole
        assert (run.stats.moves, run.stats.migrations) == (1, 0)
        run = make_run(parts, asked)
        assert await answers(several, run, harm_after=20) == whole
        assert (run.stats.moves, run.stats.migrations) == (0, 1)
        assert run.state is State.FINISHED
        assert await drains[0] == 0


async def test_metrics_tell_no_more_adapters_apart_than_their_limit(
    model_path: Path, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "MAX_ADAPTER_LABELS", 3)
    names = [f"adapter-{idx}" for idx in range(5)]
    async with running_service(model_path, redis_url, max_adapters=2) as several:
        for seed, name in enumerate(names):
            folder = save_adapter(
                tmp_path / name, model_path, rank=1, seed=seed, targets=("q_proj",)
            )
            assert (await load(several, name, folder)).status_code == 200
            (await ask(several, name, max_tokens=1)).raise_for_status()
        (await ask(several, names[0], max_tokens=1)).raise_for_status()
        assert (await ask(several, "stranger")).status_code == 404
        text = (await several.admin.get("/metrics")).text
        for what, of_each in (("requests", 1), ("prompt_tokens", len(PROMPT))):
            counts = {
                name: value(text, f"winnow_adapter_{what}_total", adapter=name)
                for name in (*names[:3], "other")
            }
            expected = zip((*names[:3], "other"), (2, 1, 1, 2), strict=True)
            assert counts == {name: times * of_each for name, times in expected}
        assert "stranger" not in text
        assert not any(f'adapter="{name}"' in text for name in names[3:])
        await several.until_idle()


async def test_a_worker_without_room_gets_no_request_for_an_adapter(
    model_path: Path, redis_url: str
) -> None:
    async with running_service(model_path, redis_url) as without:
        refused = await load(without, "any", "/anywhere")
        assert refused.status_code == 400
        told = "there is room for 0 adapters; start the service with max_adapters"
        assert refused.json()["error"]["message"] == told
