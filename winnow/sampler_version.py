"""The sampler's version, by which workers agree before a sequence goes on elsewhere."""

from winnow.errors import TransferMismatch
from winnow.sampling_params import SamplingParams

# Raise it whenever some seed gives another token. 1: one number per (seed, position), by inverse
# transform. 2: noise per (seed, position, token).
SAMPLER_VERSION = 2


def sampler_of(told: int) -> int:
    """A peer's version; peers that do not tell it, which reads as 0, have 1."""
    return told or 1


def require_same_sampler(params: SamplingParams, told: int) -> None:
    """Raise TransferMismatch if a sequence is sampled and a peer has another version."""
    if params.temperature > 0 and sampler_of(told) != SAMPLER_VERSION:
        raise TransferMismatch(
            f"sampler version of the other side is {sampler_of(told)}; this worker has "
            f"{SAMPLER_VERSION}, which would give the seed other tokens"
        )
