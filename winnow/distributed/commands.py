"""What rank 0 tells the other ranks, in the order in which they do it.

Tensors are on the host. Each rank gets its own heads; rows are those of the pool, the same
everywhere. A follower's answers go back by the same pipe.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from winnow.adapters.description import AdapterDescription
from winnow.engine.graph import Recorder
from winnow.engine.kv_pool import KVPoolConfig
from winnow.kv import LayerKV
from winnow.methods.base import HeadScore
from winnow.pruning_settings import Recompression

if TYPE_CHECKING:
    from winnow.wire import Expected  # loads protobuf, which engines do without


@dataclass(frozen=True, slots=True)
class Load:
    """Join the group and load a share of the model; answered by Ready or Failed.

    rendezvous: a file that all ranks know.  model, options: as for `load_model`.
    """

    rank: int
    num_ranks: int
    rendezvous: str
    num_threads: int
    model: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The model cannot be loaded, for this reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class OpenPool:
    """Make a KV pool for the rank's heads."""

    config: KVPoolConfig
    num_rows: int


@dataclass(frozen=True, slots=True)
class PrepareSteps:
    """Make ready to run decode steps, recorded if there is a recorder."""

    new_recorder: Callable[[], Recorder] | None


@dataclass(frozen=True, slots=True, eq=False)
class WriteLayer:
    """Replace a row's entries of a layer, and seed its query ring if it has one."""

    row: int
    layer: LayerKV


@dataclass(frozen=True, slots=True)
class ReadLayer:
    """Answer with a row's entries of a layer, and its last queries."""

    row: int
    layer_idx: int


@dataclass(frozen=True, slots=True)
class OpenRing:
    """Give a row a query ring."""

    row: int
    window_size: int


@dataclass(frozen=True, slots=True)
class Clear:
    """Free a row's pages."""

    row: int


@dataclass(frozen=True, slots=True)
class Expect:
    """Take a prompt's KV of the rank's heads for a row, in parts, until the row is cleared.

    expected: of a transfer of all heads.
    """

    row: int
    request_id: str
    attempt: int
    expected: "Expected"


@dataclass(frozen=True, slots=True)
class TakeArrived:
    """Answer with what came for a row, and take no more; answered by Arrived."""

    row: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """Entries of each of the rank's heads, by layer.  damage: why not all has come whole."""

    head_lengths: list[tuple[int, ...]]
    payload_bytes: int
    damage: str | None = None


@dataclass(frozen=True, slots=True)
class FillAdapter:
    """Put the rank's share of an adapter into a slot; answered by Filled."""

    slot: int
    description: AdapterDescription


@dataclass(frozen=True, slots=True)
class Filled:
    """refusal: why the adapter cannot be read; None: it is in its slot."""

    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Extend:
    """For the follower's Extension."""

    message: Any


@dataclass(frozen=True, slots=True)
class Step:
    """Run one decode step; the hidden states of each row's newest token come by the group.

    positions: of these tokens.  width: pages that a head of any rank takes at most.
    slots: of the rows' adapters.
    """

    rows: list[int]
    positions: list[int]
    width: int
    slots: list[int]


@dataclass(frozen=True, slots=True)
class Record:
    """Add the last step's queries of these rows of its batch to their rings."""

    batch_rows: list[int]


@dataclass(frozen=True, slots=True)
class Logits:
    """Compute the logits of so many hidden states, which follow by the group."""

    num_hidden: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Recompress rows of the same settings, each to its budget of entries per head."""

    rows: list[int]
    budgets: list[int]
    settings: Recompression


@dataclass(frozen=True, slots=True, eq=False)
class PrefillLayer:
    """Compute one layer of a prompt's last `num_tokens` tokens; the tensors follow by the group.

    num_cached: tokens before them whose keys and values follow.  positions: of the tokens, if they
    are not the last ones, and all keys and values are cached.
    same_hidden, same_positions: go on with the hidden states of the layer before, and its tables.
    has_gaps: the tokens are all that are left of the prompt, and their positions have gaps.
    num_queries: how many of the last queries to answer with; None: all.
    slot: of the adapter that computes it; None: the model alone does.
    """

    layer_idx: int
    num_tokens: int
    num_cached: int
    same_hidden: bool
    same_positions: bool
    has_gaps: bool = False
    num_queries: int | None = None
    positions: Tensor | None = None
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class ScoreLayer:
    """Give a score of the heads of the layer computed last, by the group."""

    score: HeadScore
    window_size: int


@dataclass(frozen=True, slots=True)
class CollectLayer:
    """Give keys and values of the last tokens of the layer computed last, by the group."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class PackLayer:
    """Keep what rank 0 chose of the layer computed last; what it chose follows by the group.

    num_tokens: of the layer.  head_lengths: entries to keep of every rank's KV heads; None: all.
    shipment: of what the kept entries are a part; None: give them, by the group.
    """

    num_tokens: int
    head_lengths: tuple[int, ...] | None
    window_size: int
    shipment: int | None = None


Command = (
    Load
    | OpenPool
    | PrepareSteps
    | WriteLayer
    | ReadLayer
    | OpenRing
    | Clear
    | Expect
    | TakeArrived
    | FillAdapter
    | Extend
    | Step
    | Record
    | Logits
    | Cut
    | PrefillLayer
    | ScoreLayer
    | CollectLayer
    | PackLayer
)
Answer = Any  # Ready, Failed, LayerKV, Arrived, Filled, or an Extension's
