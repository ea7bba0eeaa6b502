"""Certificates of authorities that the tests make."""

from pathlib import Path

import pytest
import trustme


def peer_files(authority: trustme.CA, folder: Path, name: str = "winnow") -> dict[str, Path]:
    """A certificate of the authority's, as settings."""
    folder.mkdir()
    issued = authority.issue_cert(name)
    issued.private_key_pem.write_to_path(folder / "key.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return {
        "peer_cert_file": folder / "cert.pem",
        "peer_key_file": folder / "key.pem",
        "peer_ca_file": folder / "ca.pem",
    }


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls_files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """TLS everywhere."""
    folder = tmp_path_factory.mktemp("tls")
    peers = peer_files(authority, folder / "peers")
    public = peer_files(authority, folder / "public", "localhost")
    return peers | {
        "tls_cert_file": public["peer_cert_file"],
        "tls_key_file": public["peer_key_file"],
    }
