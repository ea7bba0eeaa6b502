"""Every pruning method through the whole service, beside the library in this process."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from tests.services.gateway.service import MODEL_NAME, TestService
from tests.winnow.drive import prompt
from winnow import SamplingParams, Winnow
from winnow.catalog import COMPRESSIONS, METHODS, RECOMPRESSIONS
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = prompt(90)
OPTIONS: dict[str, Any] = {
    "select_tokens": 40,
    "kv_budget": 32,
    "window_size": 8,
    "kernel_size": 3,
    "observed_layers": 2,
    "min_layer": 1,
    "threshold": 0.9,
    "latest_layer": 2,
    "fixed_layer": 1,
}
NUM_NEW = 24


@pytest_asyncio.fixture(loop_scope="module")
async def stub(service: TestService) -> AsyncIterator[InferenceStub]:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        yield InferenceStub(channel)


async def assert_as_the_library(stub: InferenceStub, model_path: Path, **changes: Any) -> None:
    """The service's answer and report are those of `Winnow` with the same options."""
    options = OPTIONS | changes
    request = pb.CompleteRequest(
        model=MODEL_NAME,
        token_ids=pb.TokenIds(ids=PROMPT),
        max_tokens=NUM_NEW,
        temperature=0,
        ignore_eos=True,
        winnow=pb.WinnowOptions(**options),
    )
    chunks = [chunk async for chunk in stub.Complete(request, timeout=60)]
    tokens = [i for chunk in chunks for choice in chunk.choices for i in choice.token_ids]
    library = Winnow.load(model_path, **options)
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True)
    stream = library.stream(PROMPT, sampling)
    for _ in stream:
        pass
    assert tokens == stream.token_ids
    told, report = chunks[-1].usage.winnow, stream.report
    layer = told.selection_layer if told.HasField("selection_layer") else None
    assert (layer, told.no_selection_reason or None) == (
        report.selection_layer,
        report.no_selection_reason,
    )
    assert told.selected_tokens == report.num_selected_tokens
    assert told.computed_share == report.computed_share
    assert told.kv_bytes_kept == report.kv_bytes_kept
    assert told.recompressed_entries == stream.recompressed_entries


@pytest.mark.parametrize("method", METHODS)
async def test_the_service_prunes_as_the_library_does(
    service: TestService, stub: InferenceStub, model_path: Path, method: str
) -> None:
    await assert_as_the_library(stub, model_path, method=method)
    await service.until_idle()


@pytest.mark.parametrize("full_kv_below", [False, True])
@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_the_service_compresses_as_the_library_does(
    service: TestService,
    stub: InferenceStub,
    model_path: Path,
    compression: str,
    full_kv_below: bool,
) -> None:
    await assert_as_the_library(
        stub,
        model_path,
        method="fastkv",
        compression=compression,
        kv_top_p=0.5,
        full_kv_below=full_kv_below,
    )
    await service.until_idle()


@pytest.mark.parametrize("recompression", RECOMPRESSIONS)
@pytest.mark.parametrize("method", ["asl", "gemfilter"])
async def test_the_service_recompresses_as_the_library_does(
    service: TestService, stub: InferenceStub, model_path: Path, method: str, recompression: str
) -> None:
    await assert_as_the_library(
        stub,
        model_path,
        method=method,
        decode_budget=24,
        recompress_interval=8,
        recompression=recompression,
        redundancy_weight=0.3,
    )
    await service.until_idle()
