"""The same engines on a CUDA device. Left out where there is none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models_in_code import FAMILIES, save_tiny_model
from tests.winnow import reference
from tests.winnow.drive import (
    ASL,
    GREEDY,
    LENGTHS,
    UNPRUNED,
    admit,
    assert_empty,
    decode_all,
    ids,
    make_engine,
    prefill_all,
    prompt,
    spec,
)
from winnow.catalog import METHODS
from winnow.engine.graph import recorder_for
from winnow.engine.graph.cuda import CudaRecorder
from winnow.engine.outgoing import OutgoingBuffers
from winnow.engine.prefill import PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.kernels import scatter as scatter_reference
from winnow.models import load_model
from winnow.sampling_params import SamplingParams
from winnow.side_stream import Pace
from winnow.wire import ReceiveBuffer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_on_the_gpu_gets_the_tokens_of_generate(
    tiny_models: dict[str, Path], family: str
) -> None:
    engine = make_engine(load_model(tiny_models[family], device="cuda"))
    prompts = {str(n): prompt(n, seed=n) for n in LENGTHS}
    for name, token_ids in prompts.items():
        admit(engine, spec(name, len(token_ids), GREEDY), token_ids)
    answers = decode_all(engine)
    network = reference.load(tiny_models[family])
    expected = {name: reference.greedy(network, own, 16) for name, own in prompts.items()}
    assert {name: ids(tokens) for name, tokens in answers.items()} == expected
    assert_empty(engine)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gpu_selects_what_the_cpu_selects(
    tiny_models: dict[str, Path], family: str, method: str
) -> None:
    settings = replace(ASL, method=method, fixed_layer=1)
    on_cpu, cpu = prefill_all(load_model(tiny_models[family]), prompt(60), settings)
    on_gpu, gpu = prefill_all(load_model(tiny_models[family], device="cuda"), prompt(60), settings)
    assert gpu.report.selection_layer == cpu.report.selection_layer
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert one.positions.tolist() == other.positions.tolist()


@pytest.mark.parametrize(
    ("location", "device_bytes"), [("device", 0), ("host", 0), ("host", 30 << 10)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_follow_up_on_the_gpu_selects_what_it_selects_from_scratch(
    tiny_models: dict[str, Path], dtype: str, location: str, device_bytes: int
) -> None:
    model = load_model(tiny_models["qwen2"], device="cuda", dtype=dtype)
    store = PrefixStore(
        model, 64 << 20, location=location, device_bytes=device_bytes, block_tokens=16
    )
    for seed, layer_idx in ((1, 2), (2, 2), (3, 1), (4, 3)):
        settings = replace(ASL, method="fastkv", fixed_layer=layer_idx)
        token_ids = prompt(64) + prompt(10, seed)
        layers, result = prefill_all(model, token_ids, settings, store)
        others, expected = prefill_all(model, token_ids, settings)
        assert result.report.num_cached_tokens == (0 if seed == 1 else 64)
        for layer, like in zip(layers, others, strict=True):
            assert layer.positions.tolist() == like.positions.tolist()
        tolerance = 1e-3 if dtype == "float32" else 0.1
        torch.testing.assert_close(
            result.final_hidden, expected.final_hidden, rtol=tolerance, atol=tolerance
        )
    assert store.stats().damaged_blocks == 0


def test_layers_leave_the_gpu_beside_its_work_as_they_were_computed(
    tiny_models: dict[str, Path],
) -> None:
    model = load_model(tiny_models["llama"], device="cuda")
    buffers, pace = OutgoingBuffers.of(model.device, 4), Pace(model.device)
    run = PrefillRun(model, prompt(300), UNPRUNED, is_long=False)
    for layer in run.layers():
        outgoing = buffers.copy(layer)
        pace.end_step(ahead=1)
        with outgoing as copy:
            assert copy.keys.is_pinned()
            assert torch.equal(copy.keys, layer.keys.cpu())
            assert torch.equal(copy.positions, layer.positions.cpu())
    pace.end_step(ahead=0)
    assert buffers.num_used == 0
    assert len(buffers._free) == 1


def test_a_layer_from_a_pinned_buffer_that_is_filled_again_at_once_arrives_whole(
    tiny_models: dict[str, Path],
) -> None:
    engine = make_engine(load_model(tiny_models["llama"], device="cuda", dtype="bfloat16"))
    pool, buffer = engine.pool, ReceiveBuffer(engine.model.device)
    assert pool.storage._scatter is not scatter_reference.scatter
    layers, _ = prefill_all(load_model(tiny_models["llama"], dtype="bfloat16"), prompt(3), UNPRUNED)
    expected = []
    for row in range(20):
        num_bytes = layers[0].keys.nbytes
        keys = buffer.take(num_bytes).view(torch.bfloat16).view(layers[0].keys.shape)
        assert keys.is_pinned()
        keys.fill_(row)
        pool.write_layer(row, replace(layers[0], keys=keys))
        expected.append(torch.full_like(keys, row))
    for row, keys in enumerate(expected):
        assert torch.equal(pool.read_layer(row, 0).keys.cpu(), keys)


def test_recordings_share_what_is_freed_within_a_step() -> None:
    recorder, numbers = CudaRecorder(), torch.zeros(64 << 20, device="cuda")
    recordings, reserved = [], []
    for _ in range(2):
        recordings.append(recorder.record(lambda: ((numbers + 1).sum(),)))
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] - reserved[0] < numbers.nbytes
    assert [float(recording.replay()[0]) for recording in recordings] == [64 << 20] * 2


@pytest.mark.parametrize("own", [{}, {"decode_budget": 256, "recompress_interval": 32}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_1000_replayed_steps_give_the_tokens_of_launched_ones(
    tmp_path: Path, dtype: torch.dtype, own: dict[str, int]
) -> None:
    """Batches of a recorded size, so that both compute with the same shapes."""
    model = load_model(save_tiny_model(tmp_path, head_dim=64, dtype=dtype), device="cuda")
    answers = []
    for setting in ("auto", "off"):
        engine = make_engine(model, rows=8, new_recorder=recorder_for(model.device, setting))
        assert engine._runner.reads_late is (setting == "auto")
        for name in range(8):
            sampling = SamplingParams(1000, temperature=name % 2, seed=name, ignore_eos=True)
            length = 100 + 50 * name
            admit(engine, spec(str(name), length, sampling, **own), prompt(length, name))
        answers.append(decode_all(engine))
        assert_empty(engine)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_replays_give_the_tokens_of_generate(
    tiny_models: dict[str, Path], family: str
) -> None:
    model = load_model(tiny_models[family], device="cuda")
    engine = make_engine(model, rows=32, new_recorder=recorder_for(model.device))
    assert engine._runner.reads_late
    prompts = {str(n): prompt(n, seed=n) for n in LENGTHS}
    answers = {name: list[int]() for name in prompts}
    for name, token_ids in prompts.items():
        sampling = replace(GREEDY, max_tokens=4 + len(token_ids) % 16)
        admit(engine, spec(name, len(token_ids), sampling), token_ids)
        for output in engine.step():
            answers[output.request_id] += ids(output.tokens)
    for name, tokens in decode_all(engine).items():
        answers[name] += ids(tokens)
    network = reference.load(tiny_models[family])
    for name, own in prompts.items():
        assert answers[name] == reference.greedy(network, own, 4 + len(own) % 16)
    assert_empty(engine)
