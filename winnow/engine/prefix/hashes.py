"""Hashes that address the blocks of a prompt: equal beginnings have equal hashes.

No torch here: a router computes them too, to find the worker that holds a prompt's beginning.
"""

import hashlib
from array import array
from collections.abc import Sequence

BLOCK_TOKENS = 128


def prefix_salt(fingerprint: str, cache_salt: str = "") -> bytes:
    """What a chain of hashes starts from, so that only equal salts and models share blocks.

    fingerprint: the model's.  cache_salt: the caller's, e.g. one per tenant.
    """
    parts = [text.encode("utf-8", "surrogatepass") for text in (fingerprint, cache_salt)]
    return hashlib.blake2b(len(parts[0]).to_bytes(8) + b"".join(parts), digest_size=32).digest()


def block_hashes(
    token_ids: Sequence[int], salt: bytes, block_tokens: int = BLOCK_TOKENS
) -> list[bytes]:
    """One hash of 32 bytes per whole block: of its tokens and of the hash before it.

    salt: from `prefix_salt`.  A rest of fewer than `block_tokens` tokens has no hash.
    """
    hashes: list[bytes] = []
    parent = salt
    for end in range(block_tokens, len(token_ids) + 1, block_tokens):
        tokens = array("q", token_ids[end - block_tokens : end]).tobytes()
        parent = hashlib.blake2b(parent + tokens, digest_size=32).digest()
        hashes.append(parent)
    return hashes
