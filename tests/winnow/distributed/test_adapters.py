"""Two ranks compute adapters token for token as one process does."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.models_in_code import save_tiny_model
from tests.winnow import reference
from tests.winnow.adapters.made import merged, save_adapter
from tests.winnow.distributed.conftest import TwoRanks, two_ranks
from tests.winnow.drive import (
    ASL,
    GREEDY,
    UNPRUNED,
    admit,
    assert_empty,
    decode_all,
    ids,
    make_engine,
    prompt,
    spec,
)
from tests.winnow.eager_recorder import EagerRecorder
from winnow.adapters.ref import AdapterRoom
from winnow.adapters.slots import LoadedAdapter
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.graph import Recorder
from winnow.engine.prefix.store import PrefixStore
from winnow.errors import UnusableAdapter
from winnow.pruning_settings import PruningSettings

NAMES = (None, "all", "some", "all")
NUM_TOKENS = 60
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module", params=["qwen2", "granite"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family whose layers are fused, and one whose layers are transformers'."""
    folder = tmp_path_factory.mktemp("model") / request.param
    if request.param == "qwen2":
        return save_tiny_model(folder, request.param)
    file = save_tiny_model(folder) / "config.json"  # whose tensors have the same names
    as_granite = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | as_granite))
    return folder


@pytest.fixture(scope="module")
def folders(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    some = ("k_proj", "o_proj", "down_proj")
    return {
        "all": save_adapter(root / "all", path, rank=4),
        "some": save_adapter(root / "some", path, rank=2, seed=2, targets=some),
    }


@pytest.fixture(scope="module")
def two(path: Path) -> Iterator[TwoRanks]:
    yield from two_ranks(path, adapter_room=AdapterRoom(2, 4))


def loaded(model: DecoderModel, folders: dict[str, Path]) -> dict[str | None, LoadedAdapter | None]:
    assert model.adapters is not None
    used: dict[str | None, LoadedAdapter | None] = {None: None}
    used.update(model.adapters.preload(folders))
    return used


def answers(
    engine: DecodeEngine,
    prefill: DecoderModel,
    used: dict[str | None, LoadedAdapter | None],
    settings: PruningSettings,
    store: PrefixStore | None = None,
) -> list[list[int]]:
    for idx, name in enumerate(NAMES):
        asked = spec(str(idx), NUM_TOKENS, GREEDY, adapter=used[name])
        admit(engine, asked, prompt(NUM_TOKENS, idx), settings, store, prefill)
    tokens = decode_all(engine)
    assert_empty(engine)
    return [ids(tokens[str(idx)]) for idx in range(len(NAMES))]


@pytest.mark.parametrize("new_recorder", [None, EagerRecorder], ids=["launched", "recorded"])
@pytest.mark.parametrize("settings", [UNPRUNED, ASL], ids=["full", "asl"])
def test_two_ranks_answer_as_one_process_and_as_the_merged_model(
    two: TwoRanks,
    folders: dict[str, Path],
    path: Path,
    settings: PruningSettings,
    new_recorder: Callable[[], Recorder] | None,
) -> None:
    single = answers(make_engine(two.single), two.single, loaded(two.single, folders), settings)
    engine = two.engine(is_split=True, new_recorder=new_recorder)
    used = loaded(two.own, folders)
    assert answers(engine, two.split, used, settings) == single
    assert two.lost == []
    if settings is UNPRUNED:
        for idx, name in enumerate(NAMES):
            network = merged(path, folders[name]) if name else reference.load(path)
            wanted = reference.greedy(network, prompt(NUM_TOKENS, idx), GREEDY.max_tokens)
            assert single[idx] == wanted, name


def test_one_that_a_rank_cannot_read_is_refused_and_leaves_its_slot(
    two: TwoRanks, folders: dict[str, Path], path: Path, tmp_path: Path
) -> None:
    slots = two.own.adapters
    assert slots is not None
    for one in list(slots._loaded.values()):
        while one.num_users:
            one.end_use()
    save_adapter(
        *(tmp_path, path),
        targets=("q_proj",),
        tensors={FIRST: torch.full((4, 64), torch.nan)},
    )
    description = slots.describe("bad", tmp_path)
    with pytest.raises(
        UnusableAdapter, match=r"rank 1 of 2: adapter bad has NaN or inf in .*q_pro"
    ):
        slots.fill_others(1, description)
    with pytest.raises(UnusableAdapter, match="adapter bad has NaN or inf"):
        slots.read({"bad": tmp_path})
    slots.read(folders)
    assert {ref.name for ref in slots.loaded} == {"all", "some"}
    assert two.lost == []
