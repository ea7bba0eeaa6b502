"""The Compose services with a network between them that can fail, and clocks that can be wrong."""

from pathlib import Path
from typing import Any

from tests.chaos.clocks import Clocks
from tests.chaos.network import Network
from tests.deploy.stack import Stack

CONTROL, KV, REDIS = "control", "kv", "redis"
_ADVERTISED = {
    "WINNOW_DECODE_PORT": (CONTROL, "WINNOW_DECODE_ADVERTISED_PORT"),
    "WINNOW_KV_PORT": (KV, "WINNOW_KV_ADVERTISED_PORT"),
}


class LinkedStack(Stack):
    """Links: `decode-1 control` and `decode-1 kv` lead to its ports, `decode-1 redis` from it.

    What a test itself asks of a process does not go through them.
    """

    def __init__(self, services: dict[str, Any], folder: Path, **changes: str) -> None:
        super().__init__(services, folder, **changes)
        self.network = Network()
        self.clocks = Clocks(folder)

    def _variables(self, name: str, service: dict[str, Any]) -> dict[str, str]:
        variables = super()._variables(name, service)
        lead = self.network.lead
        for port, (link, advertised) in _ADVERTISED.items():
            if port in variables:
                variables[advertised] = str(lead(f"{name} {link}", int(variables[port])))
        redis = lead(f"{name} {REDIS}", self.ports["redis"])
        variables["WINNOW_REDIS_URL"] = f"redis://127.0.0.1:{redis}/0"
        return variables

    def _start(self, name: str, command: list[str], variables: dict[str, str]) -> None:
        super()._start(name, command, variables | self.clocks.variables(name))

    def stop(self) -> None:
        super().stop()
        self.network.close()
