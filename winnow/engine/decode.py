"""The running batch: sequences join when their KV is in place, decode together, and leave.

One step is join → forward → recompress → sample → emit. `step` belongs to one thread; every other
method may be called from any thread.
"""

import logging
import threading
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from winnow.compression.recompress import recompress_layer
from winnow.engine.kv_pool import KVPool, KVPoolConfig, PoolStats
from winnow.engine.paged_attention import PagedAttention
from winnow.engine.sequence import GenerationSpec, Reservation, Sequence
from winnow.errors import EngineFailed, WinnowError
from winnow.models import DecoderModel
from winnow.request import Token, require_range

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step did for one request; after `finished` or an `error` nothing more follows.

    tokens: new ones; none of a sequence that replays.
    recompressed_entries: dropped so far, over layers, heads and sequences.
    kv_bytes: keys and values that the request's sequences held when their tokens were sampled.
    """

    request_id: str
    tokens: tuple[Token, ...]
    recompressed_entries: int
    kv_bytes: int
    finished: bool
    error: WinnowError | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """reserved_requests: admitted, KV not complete yet.

    kv_unpruned_bytes: what the running sequences would hold had nothing been pruned.
    """

    pool: PoolStats
    running_sequences: int
    reserved_requests: int
    kv_unpruned_bytes: int


@dataclass(frozen=True, slots=True)
class EngineCounts:
    """Since the engine was made: sequences cut back, the entries kept of them, and dropped."""

    recompressions: int = 0
    kept_entries: int = 0
    dropped_entries: int = 0


class DecodeEngine:
    """Continuous batching over one model and one pool of pages."""

    def __init__(
        self, model: DecoderModel, *, pool_config: KVPoolConfig, max_batch_size: int = 64
    ) -> None:
        self.model = model
        self.max_batch_size = max_batch_size
        self.pool = KVPool(model.shape, pool_config, max_batch_size, model.device)
        self._running: list[Sequence] = []
        self._arrived: list[Sequence] = []
        self._reserved: set[Reservation] = set()
        self._changed = threading.Condition()
        self.counts = EngineCounts()

    # From any thread

    def reserve(self, spec: GenerationSpec) -> Reservation:
        """Promises memory and places for a request.

        Raises InvalidSetting if the request can never run here, Overloaded if it cannot now.
        """
        require_range("n", spec.num_sequences, 1, self.max_batch_size)
        require_range("prompt tokens", spec.num_prompt_tokens, 1, self.model.max_positions - 1)
        require_range("max_prompt_entries", spec.max_prompt_entries, 1, spec.num_prompt_tokens)
        left = self.model.max_positions - spec.num_prompt_tokens
        sampling = replace(spec.sampling, max_tokens=min(spec.sampling.max_tokens, left))
        reservation = Reservation(self.pool, replace(spec, sampling=sampling))
        with self._changed:
            self._reserved.add(reservation)
        return reservation

    def start(self, reservation: Reservation, final_hidden: Tensor, next_position: int) -> None:
        """Lets a request whose layers are all written join the batch.

        final_hidden: [hidden_size], the last prompt token's.  next_position: at which decoding
        goes on, from the prefill's report.
        """
        hidden = final_hidden.to(device=self.model.device, dtype=self.model.shape.dtype)
        sequences = reservation.begin(hidden, next_position)
        with self._changed:
            self._reserved.discard(reservation)
            if sequences is not None:
                self._arrived += sequences
                self._changed.notify_all()

    def release(self, reservation: Reservation) -> None:
        """Ends a request wherever it is and frees its pages, at the latest before the next step."""
        freed = reservation.abandon()
        with self._changed:
            self._reserved.discard(reservation)
            if not freed:
                reservation.cancelled = True
                self._changed.notify_all()

    def wait_for_work(self, timeout_s: float) -> bool:
        """Blocks until there is something for `step` to do; False if the time passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._running or self._arrived), timeout_s)

    def stats(self) -> EngineStats:
        with self._changed:
            sequences = self._running + self._arrived
            num_reserved = len(self._reserved)
        shape = self.model.shape
        entries_per_token = shape.num_layers * shape.num_kv_heads
        return EngineStats(
            pool=self.pool.stats(),
            running_sequences=len(sequences),
            reserved_requests=num_reserved,
            kv_unpruned_bytes=shape.kv_bytes(
                entries_per_token * sum(seq.num_tokens for seq in sequences)
            ),
        )

    # From the engine's thread

    def step(self) -> list[StepOutput]:
        """One token for every running sequence; what each request got."""
        self._join()
        batch = list(self._running)
        if not batch:
            return []
        try:
            logits = self.model.logits(self._forward(batch))
        except RuntimeError as error:  # out of memory, a broken kernel: nobody's KV is sure now
            logger.exception("the forward pass failed with %d sequences", len(batch))
            failure = EngineFailed(f"the forward pass failed: {error}")
            return self._emit(batch, dict.fromkeys(batch, failure))
        results = {seq: self._take(seq, row) for seq, row in zip(batch, logits, strict=True)}
        return self._emit(batch, results)

    def _join(self) -> None:
        """Lets arrived sequences into the batch and cancelled ones out."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            everyone = self._running + arrived
            leaving = [seq for seq in everyone if seq.reservation.cancelled]
            self._running = [seq for seq in everyone if seq not in leaving]
        for seq in leaving:
            self.pool.release(seq.row)
        for seq in arrived:
            if seq not in leaving:
                self._shrink_promise(seq)

    def _shrink_promise(self, seq: Sequence) -> None:
        tokens_left = seq.spec.sampling.max_tokens - seq.num_generated
        self.pool.shrink_promise(seq.row, tokens_left, seq.spec.growth_limit + 1)

    def _forward(self, batch: list[Sequence]) -> Tensor:
        """Hidden states from which each sequence's next token is sampled: [B, hidden_size]."""
        going = [seq for seq in batch if seq.final_hidden is None]
        computed = iter(self._forward_tokens(going)) if going else iter(())
        hidden = [next(computed) if seq.final_hidden is None else seq.final_hidden for seq in batch]
        for seq in batch:
            seq.final_hidden = None
        return torch.stack(hidden)

    def _forward_tokens(self, going: list[Sequence]) -> Tensor:
        """Feeds each sequence's last token through all layers: [B, hidden_size]."""
        device = self.model.device
        tokens = torch.tensor([[seq.history.generated[-1]] for seq in going], device=device)
        positions = torch.tensor([seq.next_position - 1 for seq in going], device=device)
        plan = self.pool.plan_step([seq.row for seq in going], positions)
        attention = PagedAttention(self.pool, plan)
        hidden, rope = self.model.embed(tokens), self.model.rope(positions[:, None])
        for layer_idx in range(self.model.shape.num_layers):
            hidden = self.model.layer(layer_idx, hidden, rope, attention)
        self._recompress(going, attention)
        return hidden[:, 0]

    def _recompress(self, going: list[Sequence], attention: PagedAttention) -> None:
        """Notes the step's queries, and cuts the sequences that have outgrown their budget."""
        observed = [(idx, seq) for idx, seq in enumerate(going) if seq.ring]
        if not observed:
            return
        queries = attention.stacked_queries()
        longest = self.pool.lengths([seq.row for seq in going]).amax((1, 2)).tolist()
        for idx, seq in observed:
            assert seq.ring is not None
            seq.ring.push(queries[:, idx])
            if longest[idx] > seq.spec.growth_limit:
                kept, dropped = self._cut(seq, attention.scaling)
                seq.reservation.recompressed_entries += dropped
                self.counts = EngineCounts(
                    self.counts.recompressions + 1,
                    self.counts.kept_entries + kept,
                    self.counts.dropped_entries + dropped,
                )
                self._shrink_promise(seq)

    def _cut(self, seq: Sequence, scaling: float) -> tuple[int, int]:
        """Cuts every layer of a sequence to its decode_budget; entries kept, and dropped."""
        assert seq.ring is not None and seq.spec.decode_budget is not None
        kept = dropped = 0
        for layer_idx in range(self.model.shape.num_layers):
            before = self.pool.read_layer(seq.row, layer_idx, seq.ring.ordered(layer_idx))
            after = recompress_layer(
                before,
                scaling,
                seq.spec.kernel_size,
                seq.spec.decode_budget,
                method=seq.spec.recompression,
                redundancy_weight=seq.spec.redundancy_weight,
            )
            self.pool.write_layer(seq.row, after)
            kept += after.num_entries
            dropped += before.num_entries - after.num_entries
        return kept, dropped

    def _take(self, seq: Sequence, logits: Tensor) -> Token | EngineFailed:
        try:
            token = seq.take(logits)
        except EngineFailed as error:
            return error
        return replace(token, finish_reason=seq.finish_reason(self.model))

    def _emit(
        self, batch: list[Sequence], results: dict[Sequence, Token | EngineFailed]
    ) -> list[StepOutput]:
        by_request: dict[Reservation, list[Sequence]] = {}
        for seq in batch:
            by_request.setdefault(seq.reservation, []).append(seq)
        return [
            self._output(reservation, sequences, results)
            for reservation, sequences in by_request.items()
        ]

    def _output(
        self,
        reservation: Reservation,
        sequences: list[Sequence],
        results: dict[Sequence, Token | EngineFailed],
    ) -> StepOutput:
        """One request's output; sequences that ended leave the batch and free their pages."""
        outcomes = [results[seq] for seq in sequences]
        tokens = [outcome for outcome in outcomes if isinstance(outcome, Token)]
        errors = [outcome for outcome in outcomes if isinstance(outcome, EngineFailed)]
        ended = {token.sequence_idx for token in tokens if token.finish_reason}
        new = {seq.sequence_idx for seq in sequences if seq.is_new}
        leaving = [seq for seq in sequences if errors or seq.sequence_idx in ended]
        kv_bytes = sum(self.pool.kv_bytes(seq.row) for seq in sequences)
        self._retire(leaving)
        return StepOutput(
            request_id=reservation.spec.request_id,
            tokens=tuple(token for token in tokens if token.sequence_idx in new),
            recompressed_entries=reservation.recompressed_entries,
            kv_bytes=kv_bytes,
            finished=len(leaving) == len(sequences),
            error=errors[0] if errors else None,
        )

    def _retire(self, ended: list[Sequence]) -> None:
        with self._changed:
            self._running = [seq for seq in self._running if seq not in ended]
        for seq in ended:
            self.pool.release(seq.row)
