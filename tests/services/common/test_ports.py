"""Ports for processes that start later."""

import contextlib
import socket
from pathlib import Path

import pytest

from services.cli.serve import with_ports
from services.common import ports
from services.common.ports import free_port, listening
from services.common.settings_sources import load_settings
from winnow.errors import InvalidSetting


def test_a_free_port_is_none_that_the_kernel_gives_away_by_itself() -> None:
    port = free_port()
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    assert port < int(ephemeral.split()[0])
    with socket.create_server(("127.0.0.1", port)):
        pass


def first_of_three() -> int:
    """Of free ports in a row."""
    while True:
        first = free_port()
        with contextlib.suppress(OSError):
            listening("127.0.0.1", first + 1).close()
            listening("127.0.0.1", first + 2).close()
            return first


def test_ports_that_are_taken_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = first_of_three()
    monkeypatch.setattr(ports, "_MAX_TRIES", 3)
    monkeypatch.setattr(ports, "_CANDIDATES", range(first, first + 3))
    with listening("127.0.0.1", first), listening("127.0.0.1", first + 1):
        assert free_port() == first + 2
        with (
            listening("127.0.0.1", first + 2),
            pytest.raises(InvalidSetting, match="no free port on"),
        ):
            free_port()


def test_two_settings_cannot_name_one_port() -> None:
    port = free_port()
    with pytest.raises(InvalidSetting, match=f"grpc_port {port} on 127.0.0.1 cannot be used"):
        with_ports(load_settings({"port": port, "grpc_port": port}))
