import torch

from winnow.engine.prefix import slots as slots_module
from winnow.engine.prefix.slots import Slots

SHAPE = (2, 8)
NUM_BYTES = 64


def slots_of(per_chunk: int) -> tuple[Slots, list[tuple[int, ...]]]:
    allocated: list[tuple[int, ...]] = []

    def allocate(shape: tuple[int, ...]) -> torch.Tensor:
        allocated.append(shape)
        return torch.empty(shape)

    return Slots(SHAPE, slots_module._CHUNK_BYTES // per_chunk, allocate), allocated


def test_tensors_in_use_share_no_memory() -> None:
    slots, allocated = slots_of(per_chunk=3)
    taken = [slots.take()[0] for _ in range(7)]
    for number, tensor in enumerate(taken):
        assert tensor.shape == SHAPE
        tensor.fill_(number)
    assert [set(tensor.flatten().tolist()) for tensor in taken] == [{idx} for idx in range(7)]
    assert allocated == [(3, *SHAPE)] * 3


def test_memory_given_back_is_used_again() -> None:
    slots, allocated = slots_of(per_chunk=3)
    _, give_back = slots.take()
    for _ in range(9):
        give_back()
        _, give_back = slots.take()
    assert len(allocated) == 1


def test_a_chunk_is_freed_with_the_last_that_used_it() -> None:
    slots, allocated = slots_of(per_chunk=2)
    taken = [slots.take() for _ in range(6)]
    for _, give_back in taken[2:]:
        give_back()
    del taken[2:]
    assert len(slots._chunks) == 1
    slots.take()
    assert len(allocated) == 4


def test_a_tensor_larger_than_a_chunk_has_one_of_its_own() -> None:
    slots = Slots((4,), 2 * slots_module._CHUNK_BYTES, torch.empty)
    assert slots.take()[0].shape == (4,)
