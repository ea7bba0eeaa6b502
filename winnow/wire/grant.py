"""Authorization to push or fetch one reservation's KV, and the agreed wire version.

The decode worker draws a secret for each reservation and sends it to the gateway only. A transfer's
header has an HMAC of the attempt number under that secret, so only the chosen prefill worker can
push, and only its own attempt. Likewise, only a worker that the gateway has chosen can fetch the
request when it migrates.
"""

import hmac
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field

from winnow.errors import TransferForged, TransferMismatch

WIRE_VERSIONS = (5, 6)  # supported by this release: the newest and the one before it
FIRST_WITH_STATES = 6
_SECRET_BYTES = 16


@dataclass(frozen=True, slots=True)
class Ticket:
    """What an attempt presents to the decode worker. token: 32 bytes."""

    wire_version: int
    token: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Grant:
    """Issued by the decode worker with the reservation."""

    wire_version: int
    secret: bytes = field(repr=False)

    @classmethod
    def issue(cls, offered: Collection[int]) -> "Grant":
        """Create a grant with a new secret, for the newest common wire version.

        Raises TransferMismatch if this release supports none of those offered.
        """
        version = newest_common(offered)
        if version is None:
            raise TransferMismatch(
                f"the gateway speaks wire versions {_listed(offered)}; this worker speaks "
                f"{_listed(WIRE_VERSIONS)}"
            )
        return cls(version, secrets.token_bytes(_SECRET_BYTES))

    def ticket(self, attempt: int) -> Ticket:
        """The ticket for the prefill worker of an attempt."""
        return Ticket(self.wire_version, self._sign(attempt.to_bytes(4, "little")))

    @property
    def fetch_token(self) -> bytes:
        """The token that the destination worker of a migration presents."""
        return self._sign(b"fetch")

    def _sign(self, message: bytes) -> bytes:
        return hmac.digest(self.secret, message, "sha256")

    def require(self, shown: Ticket, attempt: int) -> None:
        """Raise TransferMismatch for another wire version, TransferForged for another token."""
        if shown.wire_version != self.wire_version:
            raise TransferMismatch(
                f"wire version of the transfer is {shown.wire_version}; "
                f"{self.wire_version} was agreed on"
            )
        if not hmac.compare_digest(shown.token, self.ticket(attempt).token):
            raise TransferForged(f"the transfer does not show the token of attempt {attempt}")

    def require_fetch(self, token: bytes) -> None:
        """Raise TransferForged for another token than `fetch_token`."""
        if not hmac.compare_digest(token, self.fetch_token):
            raise TransferForged("the fetch does not show this request's token")


def newest_common(offered: Collection[int]) -> int | None:
    """The newest wire version that both sides support, or None."""
    return max(set(offered) & set(WIRE_VERSIONS), default=None)


def _listed(versions: Collection[int]) -> str:
    return ", ".join(map(str, sorted(versions))) or "that it does not tell"
