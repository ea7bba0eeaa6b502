"""Answers with adapters are those of transformers with the adapter merged into the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.winnow import reference
from tests.winnow.adapters.made import TARGETS, merged, save_adapter
from tests.winnow.drive import ASL, GREEDY, UNPRUNED, assert_empty
from tests.winnow.eager_recorder import EagerRecorder
from winnow import BatchJob, Winnow, local, models
from winnow.engine.graph import Recorder
from winnow.errors import UnknownModel

PROMPT = [(7 * idx) % 300 + 5 for idx in range(90)]
OTHER = [(11 * idx) % 300 + 5 for idx in range(40)]
FUSED = ("qkv_proj", "gate_up_proj", "o_proj", "down_proj")
NUM_NEW = GREEDY.max_tokens


@pytest.fixture
def llama(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


@pytest.fixture
def adapters(llama: Path, tmp_path: Path) -> dict[str, Path]:
    """Of different ranks, targets and scales."""
    return {
        "all": save_adapter(tmp_path / "all", llama, rank=4),
        "some": save_adapter(
            tmp_path / "some", llama, rank=2, seed=2, targets=("q_proj", "v_proj"), use_rslora=True
        ),
        "patterns": save_adapter(
            *(tmp_path / "patterns", llama),
            rank=3,
            seed=3,
            targets=("k_proj", "down_proj"),
            rank_pattern={"layers.1.mlp.down_proj": 6},
            alpha_pattern={"k_proj": 1.0},
        ),
    }


def _with_recorder(recorder: Callable[[], Recorder] | None) -> Callable[[object], object]:
    return lambda _: recorder


@pytest.mark.parametrize("recorded", [False, True])
def test_rows_of_adapters_and_of_the_model_share_a_batch(
    llama: Path, adapters: dict[str, Path], recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "recorder_for", _with_recorder(EagerRecorder if recorded else None))
    winnow = Winnow.load(llama, method="full", adapters=adapters, max_batch_size=8)
    names = (None, *adapters)
    asked = [(name, prompt) for name in names for prompt in (PROMPT, OTHER)]
    jobs = [
        BatchJob(prompt, UNPRUNED, GREEDY, adapter=None if name is None else winnow.adapter(name))
        for name, prompt in asked
    ]
    done = {one.job_idx: one.completion.token_ids for one in winnow.generate_many(jobs)}
    networks: dict[str | None, Any] = {name: merged(llama, adapters[name]) for name in adapters}
    networks[None] = reference.load(llama)
    for idx, (name, prompt) in enumerate(asked):
        assert list(done[idx]) == reference.greedy(networks[name], prompt, NUM_NEW), name
    assert len({done[idx] for idx in range(0, len(asked), 2)}) == len(networks)
    assert_empty(winnow._engine)


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_every_form_of_layer_takes_adapters(
    tiny_models: dict[str, Path], tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_models[family]
    folder = save_adapter(tmp_path, path, targets=FUSED if family == "phi3" else TARGETS)
    expected = reference.greedy(merged(path, folder), PROMPT, NUM_NEW)
    for is_fused in (True, False):
        if not is_fused:
            monkeypatch.setattr(models, "fuse_layers", lambda *_: False)
        winnow = Winnow.load(path, method="full", adapters={"one": folder})
        assert list(winnow.generate(PROMPT, GREEDY, adapter="one").token_ids) == expected
        alone = list(winnow.generate(PROMPT, GREEDY).token_ids)
        assert alone == reference.greedy(reference.load(path), PROMPT, NUM_NEW)


def test_a_pruned_prompt_is_selected_by_the_adapter(
    llama: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    winnow = Winnow.load(llama, adapters=adapters)
    winnow.pruning = ASL
    network = merged(llama, adapters["all"])
    network.save_pretrained(tmp_path / "merged")
    for file in llama.glob("token*"):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    whole = Winnow.load(tmp_path / "merged")
    whole.pruning = ASL
    expected = whole.generate(PROMPT, GREEDY)
    assert expected.report.selection_layer is not None
    assert winnow.generate(PROMPT, GREEDY, adapter="all").token_ids == expected.token_ids


def test_prefixes_of_one_adapter_are_used_by_no_other(
    llama: Path, adapters: dict[str, Path]
) -> None:
    prompt = PROMPT * 3
    winnow = Winnow.load(llama, method="full", adapters=adapters, prefix_cache_bytes=1 << 24)
    names = (None, *adapters)
    first = [winnow.generate(prompt, GREEDY, adapter=name) for name in names]
    again = [winnow.generate(prompt, GREEDY, adapter=name) for name in names]
    assert [one.report.num_cached_tokens for one in first] == [0] * len(names)
    assert all(one.report.num_cached_tokens for one in again)
    assert [one.token_ids for one in again] == [one.token_ids for one in first]
    assert len({one.token_ids for one in first}) == len(names)


def test_names_the_adapters_that_there_are(llama: Path, adapters: dict[str, Path]) -> None:
    winnow = Winnow.load(llama, adapters=adapters)
    with pytest.raises(UnknownModel, match="adapter 'none' is not loaded; loaded are all, some"):
        winnow.generate(PROMPT, adapter="none")
