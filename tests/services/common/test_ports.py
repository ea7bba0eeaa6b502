"""Ports for processes that start later."""

import socket
from pathlib import Path

import pytest

from services.common import ports
from services.common.ports import free_port
from winnow.errors import InvalidSetting


def test_a_free_port_is_none_that_the_kernel_gives_away_by_itself() -> None:
    port = free_port()
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    assert port < int(ephemeral.split()[0])
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_ports_that_are_taken_or_spoken_for_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ports, "_MAX_TRIES", 3)
    first = free_port()
    monkeypatch.setattr(ports, "_CANDIDATES", range(first, first + 3))
    with socket.create_server(("127.0.0.1", first + 1)):
        assert free_port(besides=[first]) == first + 2
        with pytest.raises(InvalidSetting, match="no free port on"):
            free_port(besides=[first, first + 2])
