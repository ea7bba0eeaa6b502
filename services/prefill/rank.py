"""What a rank other than 0 does for a prefill worker: it sends the KV of its own heads.

Rank 0 tells it where to (split_push.py), and is told what becomes of it.
"""

import contextlib
from dataclasses import dataclass

from services.common.tls import PeerTls
from services.prefill.channels import Channels
from services.prefill.parts import Outcome, Part, PartPushes
from services.prefill.sender import LAYERS_AHEAD
from winnow.distributed.follower import Follower
from winnow.engine.outgoing import OutgoingBuffers
from winnow.errors import WinnowError
from winnow.kv import LayerKV
from winnow.report import PrefillReport


@dataclass(frozen=True, slots=True)
class OpenChannels:
    """Say how to speak to decode workers; before any other message."""

    peers: PeerTls | None


@dataclass(frozen=True, slots=True)
class OpenShipment:
    """Open the rank's parts of a transfer."""

    shipment: int
    parts: list[Part]
    timeout_s: float
    trace_context: str


@dataclass(frozen=True, slots=True)
class FinishShipment:
    """All layers of the transfer have been shipped."""

    shipment: int
    report: PrefillReport


@dataclass(frozen=True, slots=True)
class EndShipment:
    """The transfer has ended, with the error if there is one; end the parts that have not."""

    shipment: int
    error: WinnowError | None


@dataclass(frozen=True, slots=True)
class HasRoom:
    """News: a layer of a part no longer waits."""

    shipment: int
    part_idx: int


@dataclass(frozen=True, slots=True)
class Moved:
    """News: frames of a part leave. It does not stall, however long its layer takes."""

    shipment: int
    part_idx: int


@dataclass(frozen=True, slots=True)
class PartEnded:
    """News: a part has ended."""

    shipment: int
    part_idx: int
    outcome: Outcome


Message = OpenChannels | OpenShipment | FinishShipment | EndShipment
News = HasRoom | Moved | PartEnded


EXTENSION = "services.prefill.rank:PrefillRank"


class PrefillRank:
    """An Extension of a follower."""

    _channels: Channels

    def __init__(self, own: Follower) -> None:
        self._own = own
        self._buffers = OutgoingBuffers.of(own.model.device, LAYERS_AHEAD + 2)
        self._shipments: dict[int, PartPushes] = {}

    def do(self, message: Message) -> None:
        match message:
            case OpenChannels(peers):
                self._channels = Channels(peers)
            case OpenShipment():
                self._open(message)
            case FinishShipment(shipment, report):
                if shipment in self._shipments:
                    self._shipments[shipment].finish(report)
            case EndShipment(shipment, error):
                pushes = self._shipments.pop(shipment, None)
                if pushes is not None and error is not None:
                    pushes.abort(error)

    def ship(self, shipment: int, layer: LayerKV) -> None:
        """Does not wait: rank 0 ships a layer when all parts have room for it."""
        if shipment in self._shipments:
            with contextlib.suppress(WinnowError):  # rank 0 is told of it by PartEnded
                self._shipments[shipment].send(layer)

    def _open(self, message: OpenShipment) -> None:
        shipment, tell = message.shipment, self._own.tell_news
        pushes = PartPushes(
            message.parts,
            self._buffers,
            lambda idx, outcome: tell(PartEnded(shipment, idx, outcome)),
            lambda idx: tell(HasRoom(shipment, idx)),
            message.trace_context,
            lambda idx: tell(Moved(shipment, idx)),
        )
        pushes.open(self._channels, message.timeout_s)
        self._shipments[shipment] = pushes
