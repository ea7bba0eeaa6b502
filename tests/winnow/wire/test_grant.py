import pytest

from winnow.errors import TransferForged, TransferMismatch
from winnow.request import Ticket
from winnow.wire import WIRE_VERSIONS, Grant, newest_common

NEWEST = max(WIRE_VERSIONS)


@pytest.mark.parametrize(
    ("offered", "agreed"), [((), 2), ((2,), 2), ((2, 3), 3), ((3, 4), 3), ((1, 2), 2)]
)
def test_the_newest_common_version_is_agreed_on(offered: tuple[int, ...], agreed: int) -> None:
    assert Grant.issue(offered).wire_version == agreed


def test_no_common_version_is_said_with_both_sides_versions() -> None:
    with pytest.raises(TransferMismatch, match=r"versions 4, 5; this worker speaks 2, 3"):
        Grant.issue((5, 4))
    assert newest_common((4, 5)) is None


def test_only_the_attempts_own_token_is_taken() -> None:
    grant = Grant.issue(WIRE_VERSIONS)
    grant.require(grant.ticket(1), 1)
    for forged in (grant.ticket(2), Grant.issue(WIRE_VERSIONS).ticket(1), Ticket(NEWEST)):
        with pytest.raises(TransferForged, match="token of attempt 1"):
            grant.require(forged, 1)


def test_an_older_version_cannot_be_used_to_avoid_the_token() -> None:
    with pytest.raises(TransferMismatch, match="transfer is 2; 3 was agreed on"):
        Grant.issue(WIRE_VERSIONS).require(Ticket(2), 1)


def test_secrets_are_not_printed() -> None:
    grant = Grant.issue(WIRE_VERSIONS)
    assert repr(grant) == "Grant(wire_version=3)"
    assert repr(grant.ticket(1)) == "Ticket(wire_version=3)"
