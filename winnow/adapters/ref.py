"""How an adapter is named between processes, and how much room there is for adapters.

No torch here: a router names them too.
"""

import hashlib
import re
from dataclasses import dataclass

from winnow.errors import InvalidSetting

DEFAULT_MAX_RANK = 16
MAX_NAME_CHARS = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@-]*")


@dataclass(frozen=True, slots=True)
class AdapterRoom:
    """What is set aside for adapters: so many at once, of this rank at most."""

    max_adapters: int
    max_rank: int = DEFAULT_MAX_RANK


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter as a request names it.  digest: see AdapterDescription.  folder: where it is."""

    name: str
    digest: str
    folder: str


def require_adapter_name(name: str) -> None:
    """Raise InvalidSetting for a name that an adapter cannot have."""
    if len(name) > MAX_NAME_CHARS:
        raise InvalidSetting(
            f"the adapter's name has {len(name):,} characters; the limit is {MAX_NAME_CHARS}",
            param="adapters",
        )
    if not _NAME.fullmatch(name):
        raise InvalidSetting(
            f"{name!r} is no adapter's name: that has letters, digits and _.:/@- and begins with "
            "a letter or digit",
            param="adapters",
        )


def kv_variant(adapter: AdapterRef | None, *, is_long: bool) -> str | None:
    """What tells a sequence's KV from that of the model's other ones; None: nothing does.

    adapter: that computes it.  is_long: it is rotated by long tables.
    """
    digest = None if adapter is None else adapter.digest
    if not is_long:
        return digest
    return f"{digest or ''}+long"


def variant_fingerprint(fingerprint: str, variant: str | None) -> str:
    """Digest of the model that a sequence's KV is of.

    fingerprint: the model's.  variant: from `kv_variant`.
    """
    if variant is None:
        return fingerprint
    return hashlib.sha256(f"{fingerprint}+{variant}".encode()).hexdigest()[:32]
