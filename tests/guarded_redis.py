"""A Redis with password and TLS, as an operator runs it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from services.common.ports import free_port
from services.common.settings import Settings
from tests.redis_process import start_redis, stop_redis

PASSWORD = "open-sesame"


class GuardedRedis:
    """A redis-server that speaks TLS alone and asks for a password."""

    def __init__(self, folder: Path, authority: trustme.CA) -> None:
        self.ca_file = folder / "ca.pem"
        self.port = free_port()
        issued = authority.issue_cert("localhost")
        authority.cert_pem.write_to_path(self.ca_file)
        issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        issued.private_key_pem.write_to_path(folder / "key.pem")
        options = {
            "bind": "127.0.0.1",
            "port": 0,
            "tls-port": self.port,
            "tls-cert-file": folder / "cert.pem",
            "tls-key-file": folder / "key.pem",
            "tls-ca-cert-file": self.ca_file,
            "tls-auth-clients": "no",
            "requirepass": PASSWORD,
            "dir": folder,
        }
        flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        self.process = start_redis(*flags)

    def url(self, password: str = PASSWORD, host: str = "localhost") -> str:
        return f"rediss://:{password}@{host}:{self.port}/0"

    def settings(self, password: str = PASSWORD, host: str = "localhost") -> Settings:
        return Settings(redis_url=self.url(password, host), redis_ca_file=self.ca_file)

    def stop(self) -> None:
        stop_redis(self.process)


@pytest.fixture(scope="module")
def guarded(
    authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuardedRedis]:
    server = GuardedRedis(tmp_path_factory.mktemp("redis"), authority)
    yield server
    server.stop()
