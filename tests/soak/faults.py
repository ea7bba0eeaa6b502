"""What befalls the processes and their network, at random but from a seed."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tests.chaos.linked_stack import CONTROL, KV, REDIS
from tests.chaos.network import SILENT, Condition
from tests.chaos.victim import LEASE_S, WORKERS, Victim

# The gateway's death breaks its streams by design, so nobody kills it here.
_PROCESSES = (*WORKERS, "prefill", "redis")
_LINKS = (
    *(f"{name} {port}" for name in WORKERS for port in (CONTROL, KV, REDIS)),
    f"gateway {REDIS}",
)
_TARGETS = {"kill": _PROCESSES, "stop": _PROCESSES, "drain": WORKERS}
_CRAWLING = Condition(bytes_per_s=1e6, delay_s=0.05)
KILL = "kill"
_ENDING = (KILL, "drain")
# In the second half of a soak nobody ends these, so that it shows whether their memory grows.
LONG_LIVED = ("decode-1", "prefill", "gateway")


@dataclass(frozen=True)
class Fault:
    """what: kill, drain, stop, silence, reset or slow. lasts_s: until it is put right."""

    what: str
    target: str
    lasts_s: float = 0.0

    @property
    def is_spared_late(self) -> bool:
        """Whether it only befalls in the first half."""
        return self.what in _ENDING and self.target in LONG_LIVED

    def befall(self, victim: Victim) -> None:
        """Returns when it is over and every process is there again."""
        match self.what:
            case "kill":
                victim.kill(self.target)
            case "drain":
                victim.drain(self.target)
            case "stop":
                victim.stop(self.target)
            case "silence":
                victim.network.become(SILENT, self.target)
            case "reset":
                victim.network.reset(self.target)
            case "slow":
                victim.network.become(_CRAWLING, self.target)
        time.sleep(self.lasts_s)
        victim.restore()


def random_faults(rng: random.Random) -> Iterator[Fault]:
    """Without end."""
    while True:
        what = rng.choice((KILL, KILL, "drain", "stop", "silence", "reset", "slow"))
        target = rng.choice(_TARGETS.get(what, _LINKS))
        lasts_s = 0.0 if what in (*_ENDING, "reset") else rng.uniform(0.5, 2) * LEASE_S
        yield Fault(what, target, lasts_s)
