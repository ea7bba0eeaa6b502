"""TLS for the gateway's public APIs, and mutual TLS between Winnow's own processes."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc
import grpc.aio

from services.common.rpc import channel_options
from services.common.settings import Settings
from winnow.errors import InvalidSetting


class _Server(Protocol):
    """The interface that sync and asyncio gRPC servers share."""

    def add_insecure_port(self, address: str) -> int: ...

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int: ...


@dataclass(frozen=True, slots=True)
class PeerTls:
    """One process's certificate for mutual TLS, and the CA that must have signed its peers'.

    name: a DNS name in every peer's certificate; the peers' addresses need not be in it.
    """

    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes
    name: str

    @classmethod
    def load(cls, settings: Settings) -> "PeerTls | None":
        """None if peers use plain text.  Raises InvalidSetting for a file that cannot be used."""
        if settings.peer_cert_file is None:
            return None
        assert settings.peer_key_file is not None and settings.peer_ca_file is not None
        _require_pair("peer_cert_file", settings.peer_cert_file, settings.peer_key_file)
        return cls(
            _read("peer_cert_file", settings.peer_cert_file),
            _read("peer_key_file", settings.peer_key_file),
            _read("peer_ca_file", settings.peer_ca_file),
            settings.peer_name,
        )

    def server_credentials(self) -> grpc.ServerCredentials:
        """Accepts only peers with a certificate from the CA; PeerGuard checks its name."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], self.authority, require_client_auth=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    def channel_options(self) -> list[tuple[str, int | str]]:
        return [*channel_options(), ("grpc.ssl_target_name_override", self.name)]


def open_channel(address: str, peers: PeerTls | None) -> grpc.Channel:
    """A channel to another Winnow process."""
    if peers is None:
        return grpc.insecure_channel(address, options=channel_options())
    credentials = peers.channel_credentials()
    return grpc.secure_channel(address, credentials, options=peers.channel_options())


def open_aio_channel(address: str, peers: PeerTls | None) -> grpc.aio.Channel:
    """`open_channel` for asyncio."""
    if peers is None:
        return grpc.aio.insecure_channel(address, options=channel_options())
    credentials = peers.channel_credentials()
    return grpc.aio.secure_channel(address, credentials, options=peers.channel_options())


def bind(
    server: _Server,
    host: str,
    port: int,
    credentials: grpc.ServerCredentials | None,
    *,
    what: str,
    param: str,
) -> int:
    """Bind to `port` (0: any free one); returns the port.  Raises InvalidSetting if it is taken."""
    address = f"{host}:{port}"
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise InvalidSetting(
            f"{what} cannot be served on {address}: the port is taken, or the address is not "
            "this machine's",
            param=param,
        ) from error


def public_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Credentials of the gateway's gRPC API; None for plain text.

    Raises InvalidSetting unless certificate and key match.
    """
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    _require_pair("tls_cert_file", settings.tls_cert_file, settings.tls_key_file)
    pair = (
        _read("tls_key_file", settings.tls_key_file),
        _read("tls_cert_file", settings.tls_cert_file),
    )
    return grpc.ssl_server_credentials([pair])


def own_verification(settings: Settings) -> ssl.SSLContext | bool:
    """The `verify` argument of httpx for requests to this service; True if it uses plain text."""
    return True if settings.tls_cert_file is None else trusting(settings.tls_cert_file)


def trusting(certificate: Path) -> ssl.SSLContext:
    """SSL context for requests to this service itself; host names are not checked."""
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _require_pair(param: str, certificate: Path, key: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidSetting(
            f"{param} {certificate} and its key {key} cannot be used: {reason}", param=param
        ) from error


def _read(param: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidSetting(f"{param} {path} cannot be read: {error.strerror}") from error
