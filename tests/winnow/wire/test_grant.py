import pytest

from winnow.errors import TransferForged, TransferMismatch
from winnow.wire import WIRE_VERSIONS, Grant, Ticket, newest_common

NEWEST = max(WIRE_VERSIONS)
NO_TOKEN = Ticket(NEWEST, b"")


@pytest.mark.parametrize(("offered", "agreed"), [((5,), 5), ((5, 6), 6), ((6, 7), 6), ((4, 5), 5)])
def test_the_newest_common_version_is_agreed_on(offered: tuple[int, ...], agreed: int) -> None:
    assert Grant.issue(offered).wire_version == agreed


def test_no_common_version_is_said_with_both_sides_versions() -> None:
    with pytest.raises(TransferMismatch, match=r"versions 7, 8; this worker speaks 5, 6"):
        Grant.issue((8, 7))
    with pytest.raises(TransferMismatch, match="versions that it does not tell; this worker"):
        Grant.issue(())
    assert newest_common((7, 8)) is None


def test_only_the_attempts_own_token_is_taken() -> None:
    grant = Grant.issue(WIRE_VERSIONS)
    grant.require(grant.ticket(1), 1)
    for forged in (grant.ticket(2), Grant.issue(WIRE_VERSIONS).ticket(1), NO_TOKEN):
        with pytest.raises(TransferForged, match="token of attempt 1"):
            grant.require(forged, 1)


def test_an_older_version_cannot_be_used_to_avoid_the_token() -> None:
    with pytest.raises(TransferMismatch, match="transfer is 2; 6 was agreed on"):
        Grant.issue(WIRE_VERSIONS).require(Ticket(2, b""), 1)


def test_only_the_token_of_a_fetch_opens_a_fetch() -> None:
    grant = Grant.issue(WIRE_VERSIONS)
    grant.require_fetch(grant.fetch_token)
    for forged in (grant.ticket(1).token, Grant.issue(WIRE_VERSIONS).fetch_token, b""):
        with pytest.raises(TransferForged, match="this request's token"):
            grant.require_fetch(forged)


def test_secrets_are_not_printed() -> None:
    grant = Grant.issue(WIRE_VERSIONS)
    assert repr(grant) == "Grant(wire_version=6)"
    assert repr(grant.ticket(1)) == "Ticket(wire_version=6)"
