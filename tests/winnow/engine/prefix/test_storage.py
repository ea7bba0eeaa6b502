import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.engine.prefix.storage import DamagedBlock, Storage

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
