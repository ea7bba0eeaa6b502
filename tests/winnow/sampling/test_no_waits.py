"""Nothing between the logits and the one read at the end waits for the device."""

import torch

from tests.winnow.no_waiting import META, no_waiting
from tests.winnow.sampling.reference import mixed_states
from winnow.sampling import sample_batch


def test_a_batch_of_every_kind_is_sampled_without_waiting() -> None:
    states = mixed_states()
    logits = torch.empty(len(states), 3000, device=META)
    with no_waiting():
        sampled = sample_batch(logits, states, {0, 2})
    assert sampled.tokens.device == META
    assert len(sampled.columns.wait()) == len(states)
