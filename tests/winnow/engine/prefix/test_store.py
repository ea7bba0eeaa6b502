import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from torch import Tensor

from winnow.decoder import DecoderModel
from winnow.engine.prefix import slots, tiers
from winnow.engine.prefix.block import Block
from winnow.engine.prefix.prompt_blocks import PromptBlocks
from winnow.engine.prefix.reads import Reads
from winnow.engine.prefix.storage import DamagedBlock, Storage, StorageFull, Stored
from winnow.engine.prefix.store import PrefixStore
from winnow.errors import InvalidSetting
from winnow.models import load_model

BLOCK = 8
NUM_LAYERS = 4


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models["llama"])


def layer_bytes(model: DecoderModel) -> int:
    return model.shape.kv_bytes(BLOCK * model.shape.num_kv_heads)


def frontier_bytes(model: DecoderModel) -> int:
    return BLOCK * model.shape.hidden_size * model.shape.dtype.itemsize


def content(seed: object, *shape: int) -> Tensor:
    return torch.full(shape, float(hash(seed) % 1009))


class Run:
    """Goes through the layers as prefill does, with contents that only depend on the block."""

    def __init__(self, store: PrefixStore, tokens: tuple[int, ...], salt: str) -> None:
        token_ids = [token for token in tokens for _ in range(BLOCK)]
        self.hashes = store.hashes(token_ids, salt)
        self.blocks = PromptBlocks(store, token_ids, salt)
        self.num_tokens = len(token_ids) + 1
        self.layer_idx = 0
        self.start = min(self.blocks.num_cached(0), self.num_tokens - 1)

    def step(self) -> None:
        while True:
            try:
                return self._compute(self.layer_idx, self.num_tokens)
            except DamagedBlock as damage:
                self.repair(damage.idx)

    def repair(self, block_idx: int) -> None:
        first, until = self.blocks.replace(block_idx) * BLOCK, self.start
        assert first <= until
        for layer_idx in range(self.layer_idx):
            self.start = min(self.blocks.num_cached(layer_idx), first)
            self.give(layer_idx, until)
        self.start = min(self.start, first)

    def _compute(self, layer_idx: int, num_tokens: int) -> None:
        start = min(self.blocks.num_cached(layer_idx), num_tokens - 1)
        if start < self.start and layer_idx:
            joining = self.blocks.hidden(layer_idx - 1, start, self.start)
            assert torch.equal(joining, self.hidden(layer_idx - 1, self.start)[start:])
        self.start = start
        if start:
            both = self.blocks.keys_and_values(layer_idx, start, num_tokens)
            assert torch.equal(both[:, :, :start], self.layer(layer_idx, num_tokens)[:, :, :start])
        self.give(layer_idx, num_tokens)
        self.layer_idx += 1

    def give(self, layer_idx: int, num_tokens: int) -> None:
        keys, values = self.layer(layer_idx, num_tokens)[:, :, self.start :]
        hidden = self.hidden(layer_idx, num_tokens)[self.start :]
        self.blocks.grow(layer_idx, self.start, (keys, values), hidden, {})

    def layer(self, layer_idx: int, num_tokens: int) -> Tensor:
        parts = [content((one, layer_idx), 2, 2, BLOCK, 16) for one in self.hashes]
        return torch.cat([*parts, torch.zeros(2, 2, 1, 16)], dim=2)[:, :, :num_tokens]

    def hidden(self, layer_idx: int, num_tokens: int) -> Tensor:
        parts = [content((one, layer_idx, "hidden"), BLOCK, 64) for one in self.hashes]
        return torch.cat([*parts, torch.zeros(1, 64)])[:num_tokens]


def parts_of(block: Block) -> list[Stored]:
    return [one for one in (*block.layers, block.frontier) if one is not None]


class Machine(RuleBasedStateMachine):
    """Runs of prompts of up to four blocks that share beginnings, in any order."""

    model: DecoderModel
    location: str
    device_layers: int
    max_layers: int
    runs = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[Run] = []
        layer, frontier = layer_bytes(self.model), frontier_bytes(self.model)
        self.store = PrefixStore(
            self.model,
            self.max_layers * layer + self.max_layers // 2 * frontier,
            location=self.location,
            device_bytes=self.device_layers * (layer + frontier),
            block_tokens=BLOCK,
        )

    @rule(
        target=runs,
        tokens=st.lists(st.integers(0, 1), max_size=4).map(tuple),
        salt=st.sampled_from(["", "other"]),
    )
    def start(self, tokens: tuple[int, ...], salt: str) -> Run:
        run = Run(self.store, tokens, salt)
        self.open.append(run)
        return run

    @rule(run=runs, num_layers=st.integers(1, NUM_LAYERS))
    def compute(self, run: Run, num_layers: int) -> None:
        for _ in range(min(num_layers, NUM_LAYERS - run.layer_idx)):
            run.step()

    @rule(run=consumes(runs))
    def close(self, run: Run) -> None:
        run.blocks.close()
        run.blocks.close()  # has no further effect
        self.open.remove(run)

    @rule(run=consumes(runs))
    def drop(self, run: Run) -> None:
        self.store.abandon(run.blocks.close)
        self.open.remove(run)
        self.store.release_abandoned()

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        stored = [
            one
            for block in self.store._blocks.values()
            for one in parts_of(block)
            if one.checksum is not None
        ]
        if stored:
            one = data.draw(st.sampled_from(stored))
            one.tensor.view(-1)[3] += 1

    @invariant()
    def memory_is_counted_and_within_the_limit(self) -> None:
        blocks = set(self.blocks())
        each = layer_bytes(self.model), frontier_bytes(self.model)
        held = sum(block.depth * each[0] + (block.depth > 0) * each[1] for block in blocks)
        stats = self.store.stats()
        assert stats.used_bytes == held <= stats.max_bytes
        assert all(tier.has_room(0) for tier in self.store.memory.tiers)

    @invariant()
    def each_part_of_a_block_is_charged_to_the_memory_that_it_is_in(self) -> None:
        for tier in self.store.memory.tiers:
            blocks = [block for block in self.blocks() if block.depth]
            layers = [one for block in blocks for one in block.layers if one.storage is tier]
            frontiers = [block for block in blocks if block.frontier_tier is tier]
            expected = len(layers) * layer_bytes(self.model)
            expected += len(frontiers) * frontier_bytes(self.model)
            assert tier.used_bytes == expected
            idle = [block for block in blocks if block in self.store._idle]
            is_there = any(one.storage is tier for block in idle for one in parts_of(block))
            assert (self.store._idle.oldest_in(tier) is not None) == is_there

    @invariant()
    def no_block_is_deeper_than_its_parent(self) -> None:
        for block in self.blocks():
            if block.parent is not None:
                assert block.depth <= block.parent.depth or block.dropped
                assert block.dropped or self.store._blocks[block.parent.hash] is block.parent
                assert block.dropped or block in block.parent.children

    @invariant()
    def users_are_counted(self) -> None:
        uses = [block for run in self.open for block in run.blocks._blocks]
        assert all(block.num_users == uses.count(block) for block in self.blocks())
        idle = {block for block in self.store._blocks.values() if not block.num_users}
        assert set(self.store._idle) == idle
        assert all(block.depth for block in idle)

    def blocks(self) -> set[Block]:
        uses = {block for run in self.open for block in run.blocks._blocks}
        return uses | set(self.store._blocks.values())

    def teardown(self) -> None:
        for run in self.open:
            run.blocks.close()
        assert self.store.stats().num_blocks_in_use == 0


@pytest.mark.parametrize(
    ("location", "device_layers", "max_layers"),
    [("device", 0, 9), ("host", 0, 9), ("host", 1, 9), ("host", 5, 9), ("host", 2, 2)],
)
def test_any_order_of_runs_leaves_the_store_consistent(
    model: DecoderModel, location: str, device_layers: int, max_layers: int
) -> None:
    class Here(Machine):
        pass

    Here.model, Here.location = model, location
    Here.device_layers, Here.max_layers = device_layers, max_layers
    case = Here.TestCase
    case.settings = settings(max_examples=60, stateful_step_count=30)
    case().runTest()


def test_refuses_memory_for_less_than_one_layer_of_a_block(model: DecoderModel) -> None:
    least = layer_bytes(model) + frontier_bytes(model)
    PrefixStore(model, least, block_tokens=BLOCK)
    with pytest.raises(InvalidSetting, match=f"{least - 1:,}; one layer of 8 tokens .* {least:,}"):
        PrefixStore(model, least - 1, block_tokens=BLOCK)


def test_refuses_memory_beside_the_model_for_less_than_one_layer_of_a_block(
    model: DecoderModel,
) -> None:
    least = layer_bytes(model) + frontier_bytes(model)
    with pytest.raises(InvalidSetting, match=f"prefix_cache_device_bytes is {least - 1:,}; one"):
        PrefixStore(model, least, location="host", device_bytes=least - 1, block_tokens=BLOCK)


def test_memory_beside_the_model_is_for_gpus_and_must_be_free(
    model: DecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = DecoderModel(model._model, model.description, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 << 20, 9 << 20))

    def device_bytes(own: DecoderModel, most: int, where: str, beside_model: int) -> int:
        store = PrefixStore.within(own, most, where, prefix_cache_device_bytes=beside_model)
        assert store is not None
        return store.stats().device_max_bytes

    assert device_bytes(model, 4 << 20, "host", 4 << 20) == 0
    assert device_bytes(on_gpu, 4 << 20, "host", 2 << 20) == 2 << 20
    assert device_bytes(on_gpu, 99 << 20, "host", 0) == 0
    assert device_bytes(on_gpu, 4 << 20, "device", 9 << 20) == 4 << 20
    for setting, given in (
        ("prefix_cache_device_bytes", (9 << 20, "host", 9 << 20)),
        ("prefix_cache_bytes", (9 << 20, "device", 1 << 20)),
    ):
        expected = f"{setting} is 9,437,184; beside the model 8,388,608 bytes of cuda are free"
        with pytest.raises(InvalidSetting, match=expected):
            device_bytes(on_gpu, *given)


def test_refuses_an_unknown_location(model: DecoderModel) -> None:
    with pytest.raises(InvalidSetting, match="prefix_cache_device is 'disk'; known are device, ho"):
        PrefixStore(model, 1 << 20, location="disk")


def test_the_least_recently_used_leaves_are_evicted(model: DecoderModel) -> None:
    chain = 2 * (layer_bytes(model) + frontier_bytes(model))
    store = PrefixStore(model, 2 * chain, block_tokens=BLOCK)
    for tokens in ((1, 1), (2, 2), (1, 1), (3,)):
        run = Run(store, tokens, "")
        run.step()
        run.blocks.close()
    one, two, three = (Run(store, tokens, "") for tokens in ((1, 1), (2, 2), (3,)))
    assert [run.blocks.num_cached(0) for run in (one, two, three)] == [16, 8, 8]
    assert set(store.held()) == {*one.hashes, two.hashes[0], *three.hashes}
    assert store.stats().evicted_blocks == 1
    assert store.stats().used_bytes == 2 * chain


def test_blocks_move_to_host_memory_before_they_are_given_up_and_come_back_when_they_are_used(
    model: DecoderModel,
) -> None:
    one = layer_bytes(model) + frontier_bytes(model)
    store = PrefixStore(model, 3 * one, location="host", device_bytes=2 * one, block_tokens=BLOCK)

    def use(*tokens: int) -> None:
        run = Run(store, tokens, "")
        run.step()  # checks what is there
        run.blocks.close()

    def places() -> list[str]:
        """Where the layer of each block is that begins a prompt, in the order of their tokens."""
        names = []
        for token in range(5):
            (block_hash,) = store.hashes([token] * BLOCK, "")
            block = store._blocks.get(block_hash)
            moved = block is not None and block.layers[0].checksum is not None
            names.append("gone" if block is None else "host" if moved else "device")
        return names

    for token in range(4):
        use(token)
    assert places() == ["host", "host", "device", "device", "gone"]
    use(1)
    assert places() == ["host", "device", "host", "device", "gone"]
    use(4)
    assert places() == ["gone", "device", "host", "host", "device"]
    stats = store.stats()
    assert (stats.moved_blocks, stats.evicted_blocks, stats.damaged_blocks) == (4, 1, 0)
    beside_model = 2 * one - frontier_bytes(model)  # which the block that came back left behind
    assert (stats.device_used_bytes, stats.device_max_bytes) == (beside_model, 2 * one)
    assert (stats.used_bytes, stats.max_bytes) == (4 * one, 5 * one)


def test_a_block_for_which_host_memory_is_too_small_is_given_up_alone(model: DecoderModel) -> None:
    one = layer_bytes(model) + frontier_bytes(model)
    device_bytes = one + 3 * layer_bytes(model) + one
    store = PrefixStore(
        model, 2 * one, location="host", device_bytes=device_bytes, block_tokens=BLOCK
    )
    deep, grows, held, idle = (Run(store, (token,), "") for token in range(4))
    for run, depth in ((deep, 4), (grows, 1), (held, 1), (idle, 1)):
        for _ in range(depth):
            run.step()
    deep.blocks.close()
    idle.blocks.close()
    assert store.stats().used_bytes == store.stats().max_bytes
    grows.step()
    assert set(store.held()) == {run.hashes[0] for run in (grows, held, idle)}
    assert (store.stats().evicted_blocks, store.stats().moved_blocks) == (1, 0)


@pytest.mark.parametrize("device_layers", [0, 1, 3])
def test_what_is_read_is_the_copy_that_was_checked_or_beside_the_model(
    model: DecoderModel, monkeypatch: pytest.MonkeyPatch, device_layers: int
) -> None:
    one = layer_bytes(model) + frontier_bytes(model)
    store = PrefixStore(
        model, 9 * one, location="host", device_bytes=device_layers * one, block_tokens=BLOCK
    )
    for tokens in ((1, 2), (3, 4, 5)):
        run = Run(store, tokens, "")
        run.step()
        run.blocks.close()

    @contextlib.contextmanager
    def after(_: Reads, group: int) -> Iterator[Callable[[Tensor], Tensor]]:
        yield torch.clone  # as on a GPU, another tensor

    monkeypatch.setattr(Reads, "after", after)
    blocks = store.take(Run(store, (1, 2), "").hashes)
    for _ in range(2):
        for part, block in zip(store.fetch_layer(blocks, 0), blocks, strict=True):
            stored = block.layers[0]
            assert torch.equal(part, stored.tensor)
            assert (part is stored.tensor) == (stored.checksum is None)
    came_back = [block.layers[0].checksum is None for block in blocks]
    assert came_back == [device_layers > 0] * 2


def test_gaps_that_shallow_blocks_leave_do_not_take_more_memory(
    model: DecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one layer have many hidden states, those of four have many keys and values."""
    chunk, max_bytes = 16 << 10, 256 << 10
    monkeypatch.setattr(slots, "_CHUNK_BYTES", chunk)
    monkeypatch.setattr(tiers, "_SPARE_BYTES", 2 * chunk)
    store = PrefixStore(model, max_bytes, block_tokens=BLOCK)
    random = Random(0)
    for depths in ((1,), (4,), (1, 4), (1,)):
        for _ in range(100):
            tokens = random.choice([(1, 2), (3,), tuple(random.choices(range(10**6), k=6))])
            run = Run(store, tokens, "")
            for _ in range(random.choice(depths)):
                run.step()
            run.blocks.close()
            assert store.memory.tiers[0].allocated_bytes <= max_bytes + 2 * chunk
    assert store.stats().used_bytes > max_bytes / 2


def test_without_memory_for_a_copy_a_run_goes_on_and_leaves_the_store_in_order(
    model: DecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PrefixStore(model, 1 << 20, block_tokens=BLOCK)

    def full(*_: object) -> Stored:
        raise StorageFull("no memory left")

    first, second = Run(store, (1, 2), ""), Run(store, (3,), "")
    first.step()
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put", full)
        second.step()
        first.step()  # has to copy what it computed, and cannot
        first.step()
        for run in (first, second):
            run.blocks.close()
    stats = store.stats()
    assert (stats.num_blocks, stats.num_blocks_in_use, stats.used_bytes) == (0, 0, 0)
    assert stats.damaged_blocks == 0
    again = Run(store, (1, 2), "")
    again.step()
    again.blocks.close()
    assert store.stats().num_blocks == 2
