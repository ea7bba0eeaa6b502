"""What a rank other than 0 does for a decode worker: it serves KvTransfer.Push of its own heads.

Rank 0 tells it what may come (winnow/distributed/arrivals.py).
"""

from dataclasses import dataclass

from services.common.tls import PeerTls
from services.decode.kv_server import KvServer
from services.decode.parts import PartReceiver
from winnow.distributed.follower import Follower
from winnow.errors import InvalidSetting
from winnow.kv import LayerKV


@dataclass(frozen=True, slots=True)
class ServeKv:
    """Serve KvTransfer; answered by ServingKv.  port: 0 is any free one."""

    host: str
    port: int
    peers: PeerTls | None


@dataclass(frozen=True, slots=True)
class ServingKv:
    """refusal: why it cannot be served."""

    port: int
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class PlacingFailed:
    """News: the device may have kept a part of a transfer from its place."""


EXTENSION = "services.decode.rank:DecodeRank"


class DecodeRank:
    """An Extension of a follower."""

    def __init__(self, own: Follower) -> None:
        self._own = own
        self._server: KvServer | None = None

    def do(self, message: ServeKv) -> ServingKv:
        device = self._own.model.device
        tell = self._own.tell_news
        receiver = PartReceiver(self._own.pool.arrivals, device, lambda: tell(PlacingFailed()))
        server = KvServer(receiver, None, message.peers, of_several_ranks=True, device=device)
        try:
            port = server.start(message.host, message.port)
        except InvalidSetting as error:  # rank 0 tells of it
            return ServingKv(0, error.message)
        self._server = server
        return ServingKv(port)

    def ship(self, shipment: int, layer: LayerKV) -> None:
        raise AssertionError("a decode worker prefills nothing")
