import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.engine.prefix import slots
from winnow.engine.prefix.storage import DamagedBlock, Storage, StorageFull

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_host_memory", [False, True])
def test_gives_back_what_it_was_given(dtype: torch.dtype, in_host_memory: bool) -> None:
    storage = Storage(CPU, in_host_memory=in_host_memory)
    tensors = [torch.randn(2, 8, 4).to(dtype), torch.randn(8, 6).to(dtype)]
    expected = [tensor.clone() for tensor in tensors]
    stored = [storage.put(tensor) for tensor in tensors]
    for found, wanted in zip(storage.fetch(stored), expected, strict=True):
        assert torch.equal(found, wanted)


@given(st.integers(0, 2), st.integers(0, 8 * 64 - 1))
def test_a_single_changed_bit_is_found_in_host_memory(tensor_idx: int, bit: int) -> None:
    storage = Storage(CPU, in_host_memory=True)
    stored = [storage.put(torch.randn(2, 8, 1)) for _ in range(3)]
    stored[tensor_idx].tensor.view(torch.uint8).view(-1)[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(DamagedBlock) as damage:
        storage.fetch(stored)
    assert damage.value.idx == tensor_idx
    del stored[tensor_idx]
    assert len(storage.fetch(stored)) == 2


def test_words_that_change_places_are_found() -> None:
    storage = Storage(CPU, in_host_memory=True)
    stored = storage.put(torch.randn(8, 2))
    stored.tensor.copy_(stored.tensor.flip(0))
    with pytest.raises(DamagedBlock):
        storage.fetch([stored])


def test_memory_is_used_again_when_nobody_has_what_was_stored() -> None:
    storage = Storage(CPU, in_host_memory=False)
    first = storage.put(torch.ones(2, 8))
    place = first.tensor.data_ptr()
    del first
    assert storage.put(torch.zeros(2, 8)).tensor.data_ptr() == place


def test_takes_no_more_memory_than_it_may_but_for_the_first_piece_of_each_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "_CHUNK_BYTES", 128)
    storage = Storage(CPU, in_host_memory=False, max_bytes=256)
    stored = [storage.put(torch.randn(16)) for _ in range(4)]
    with pytest.raises(StorageFull, match="256 bytes of 256 are taken"):
        storage.put(torch.randn(16))
    storage.put(torch.randn(8))
    assert storage.allocated_bytes == 384
    del stored[0]
    storage.put(torch.randn(16))
    assert storage.allocated_bytes == 384


def test_a_system_without_memory_fills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(CPU, in_host_memory=False)

    def no_memory(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch, pytest.raises(StorageFull, match="no memory left"):
        patch.setattr(torch, "empty", no_memory)
        storage.put(torch.ones(8))
    assert torch.equal(storage.put(torch.ones(8)).tensor, torch.ones(8))
