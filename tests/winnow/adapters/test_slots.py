"""Which adapters a model has in its slots, and which gives way to another."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.winnow.adapters.made import save_adapter
from winnow.adapters.description import AdapterDescription
from winnow.adapters.ref import AdapterRef, AdapterRoom
from winnow.adapters.slots import AdapterSlots
from winnow.errors import ModelMismatch, Overloaded, UnusableAdapter
from winnow.models import load_model

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def folders(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root, model = tmp_path_factory.mktemp("adapters"), tiny_models["llama"]
    return {
        name: save_adapter(root / name, model, seed=ord(name), targets=("q_proj",))
        for name in "abc"
    }


@pytest.fixture
def slots(tiny_models: dict[str, Path]) -> AdapterSlots:
    model = load_model(tiny_models["llama"], adapter_room=AdapterRoom(2, 4))
    assert model.adapters is not None
    return model.adapters


@pytest.fixture
def refs(slots: AdapterSlots, folders: dict[str, Path]) -> dict[str, AdapterRef]:
    return {name: slots.describe(name, folder).ref for name, folder in folders.items()}


def test_the_least_recently_used_idle_one_gives_way(
    slots: AdapterSlots, refs: dict[str, AdapterRef]
) -> None:
    first, second = slots.use(refs["a"]), slots.use(refs["b"])
    assert {first.slot, second.slot} == {1, 2}
    assert slots.use(refs["a"]) is first
    with pytest.raises(Overloaded, match=r"adapter c: all 2 \(max_adapters\) are in use"):
        slots.use(refs["c"])
    second.end_use()
    first.end_use()
    third = slots.use(refs["c"])
    assert third.slot == second.slot
    assert {ref.name for ref in slots.loaded} == {"a", "c"}
    third.end_use()
    first.end_use()  # after `third`
    assert slots.use(refs["b"]).slot == third.slot


def test_one_that_is_read_by_two_requests_takes_one_slot(
    slots: AdapterSlots, refs: dict[str, AdapterRef]
) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(slots.use(refs["a"]))) for _ in "123"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.slot for one in found}) == 1
    assert found[0].num_users == 3


def test_another_adapter_in_the_folder_is_refused(
    slots: AdapterSlots, refs: dict[str, AdapterRef], folders: dict[str, Path]
) -> None:
    told = f"has digest {refs['b'].digest} here; the request's has {refs['a'].digest}"
    with pytest.raises(ModelMismatch, match=told):
        slots.use(replace(refs["a"], folder=str(folders["b"])))
    with pytest.raises(ModelMismatch, match="folder /nowhere does not exist"):
        slots.use(replace(refs["a"], folder="/nowhere"))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_weights_of_another_dtype_become_the_models(
    slots: AdapterSlots, tiny_models: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    save_adapter(tmp_path, tiny_models["llama"], targets=("q_proj",))
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: one.to(dtype) for name, one in load_file(file).items()}, file)
    loaded = slots.preload({"other": tmp_path})["other"]
    (first, *_) = [one for one in slots._stacks if one.names[0].endswith("q_proj")]
    down = load_file(file)[FIRST].float()
    assert torch.equal(first._down[loaded.slot - 1, 0], down)


def test_files_that_change_or_vanish_while_they_are_read_leave_the_slot(
    slots: AdapterSlots,
    refs: dict[str, AdapterRef],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_adapter(tmp_path, tiny_models["llama"], targets=("q_proj",))
    ref = slots.describe("mine", tmp_path).ref
    describe, file = slots.describe, tmp_path / "adapter_model.safetensors"

    def then(change: Callable[[], object]) -> Callable[..., AdapterDescription]:
        def changed(name: str, folder: str) -> AdapterDescription:
            found = describe(name, folder)
            change()
            return found

        return changed

    other = Path(refs["a"].folder) / file.name
    for change, told in (
        (lambda: file.write_bytes(other.read_bytes()), "was changed while it was read"),
        (file.unlink, f"adapter mine in {tmp_path} cannot be read: "),
    ):
        save_adapter(tmp_path, tiny_models["llama"], targets=("q_proj",))
        monkeypatch.setattr(slots, "describe", then(change))
        with pytest.raises(ModelMismatch, match=told):
            slots.use(ref)
    monkeypatch.setattr(slots, "describe", describe)
    assert slots.loaded == ()
    assert {slots.use(refs[name]).slot for name in "ab"} == {1, 2}


def test_one_that_is_not_finite_is_refused_and_leaves_its_slot(
    slots: AdapterSlots, refs: dict[str, AdapterRef], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    tensors = {FIRST: torch.full((4, 64), torch.nan)}
    save_adapter(tmp_path, tiny_models["llama"], targets=("q_proj",), tensors=tensors)
    with pytest.raises(UnusableAdapter, match=r"has NaN or inf in .*layers.0.self_attn.q_proj"):
        slots.read({"bad": tmp_path})
    slots.read({name: Path(refs[name].folder) for name in "ab"})
    assert {ref.name for ref in slots.loaded} == {"a", "b"}
