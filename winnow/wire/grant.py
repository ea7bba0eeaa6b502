"""Leave to push one reservation's KV: which wire version, and who may.

Wire version 3 covers the report by the digest too, and adds a token to the header: an HMAC of the
attempt's number under a secret that the decode worker draws for each reservation and tells the
gateway alone. So only the prefill worker that was asked can push, and only the attempt it was
asked for. Version 2 has no token; it is granted only to a gateway that offers nothing newer, which
is what a release before this one does.
"""

import hmac
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field

from winnow.errors import TransferForged, TransferMismatch
from winnow.request import Ticket

WIRE_VERSIONS = (2, 3)  # spoken by this release: the newest, and the one before it
_FIRST_WITH_TOKEN = 3
_FIRST_WITH_COVERED_REPORT = 3
_UNSAID = 2  # spoken by peers that do not say
_SECRET_BYTES = 16


@dataclass(frozen=True, slots=True)
class Grant:
    """Issued by the decode worker with the reservation. secret: empty before wire version 3."""

    wire_version: int = _UNSAID
    secret: bytes = field(default=b"", repr=False)

    @classmethod
    def issue(cls, offered: Collection[int]) -> "Grant":
        """The newest wire version of those offered; none offered means 2.

        Raises TransferMismatch if this release speaks none of them.
        """
        version = newest_common(offered or (_UNSAID,))
        if version is None:
            raise TransferMismatch(
                f"the gateway speaks wire versions {_listed(offered)}; this worker speaks "
                f"{_listed(WIRE_VERSIONS)}"
            )
        has_token = version >= _FIRST_WITH_TOKEN
        return cls(version, secrets.token_bytes(_SECRET_BYTES) if has_token else b"")

    def ticket(self, attempt: int) -> Ticket:
        """What the attempt's prefill worker is given."""
        if not self.secret:
            return Ticket(self.wire_version)
        token = hmac.digest(self.secret, attempt.to_bytes(4, "little"), "sha256")
        return Ticket(self.wire_version, token)

    def require(self, shown: Ticket, attempt: int) -> None:
        """Raise TransferMismatch for another wire version, TransferForged for another token."""
        if shown.wire_version != self.wire_version:
            raise TransferMismatch(
                f"wire version of the transfer is {shown.wire_version}; "
                f"{self.wire_version} was agreed on"
            )
        if not hmac.compare_digest(shown.token, self.ticket(attempt).token):
            raise TransferForged(f"the transfer does not show the token of attempt {attempt}")


def covers_report(wire_version: int) -> bool:
    """Whether a transfer's digest is also over the report in its trailer."""
    return wire_version >= _FIRST_WITH_COVERED_REPORT


def newest_common(offered: Collection[int]) -> int | None:
    """The newest wire version that both sides speak, None if there is none."""
    return max(set(offered) & set(WIRE_VERSIONS), default=None)


def _listed(versions: Collection[int]) -> str:
    return ", ".join(map(str, sorted(versions)))
