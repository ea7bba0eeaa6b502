"""Blocks' probability masses, and what is sampled by them, against PyTorch's operations."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.winnow.sampling.draws import SETTINGS, assert_shares, draws, many
from tests.winnow.sampling.reference import mixed_states, outcomes, probabilities, state, tokens
from winnow.kernels.cpu import masses as on_cpu
from winnow.sampling.masses import LOG2_E, block_masses
from winnow.sampling_params import SamplingParams


@pytest.fixture
def pytorch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Without the kernel, until `undo`."""
    monkeypatch.setattr(on_cpu, "can_sum", lambda _: False)
    yield monkeypatch


def test_the_kernel_takes_float32_rows() -> None:
    logits = torch.zeros(2, 300)
    assert on_cpu.can_sum(logits)
    assert on_cpu.can_sum(torch.zeros(2, 400)[:, :300])
    assert not on_cpu.can_sum(logits.double())
    assert not on_cpu.can_sum(torch.zeros(300, 2).T)


@pytest.mark.parametrize("threshold", [None, -2.0, 100.0])
@pytest.mark.parametrize("size", [1, 15, 256, 257, 1500, 40_001])
def test_masses_equal_their_reference(
    size: int, threshold: float | None, pytorch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(3, size + 5, generator=torch.Generator().manual_seed(size))[:, :size] * 9
    best = logits.amax(-1, keepdim=True)
    scale = torch.tensor([[LOG2_E], [LOG2_E / 0.1], [LOG2_E * 2**27]])
    least = None if threshold is None else torch.full_like(best, threshold)
    expected = block_masses(logits, best, scale, least)
    pytorch.undo()
    found = block_masses(logits, best, scale, least)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("name", ["temperature 0.6", "min-p", "all filters", "top-p"])
def test_shares_are_the_probabilities(name: str) -> None:
    params = SamplingParams(max_tokens=100, **SETTINGS[name])
    assert_shares(draws(params, many()), probabilities(many(), params))


def test_a_row_does_not_depend_on_its_batch() -> None:
    states = mixed_states()
    logits = torch.randn(len(states), 3000, generator=torch.Generator().manual_seed(1)) * 3
    together = outcomes(logits, states, {0, 2})
    alone = [outcomes(row[None], [one], {0, 2})[0] for row, one in zip(logits, states, strict=True)]
    assert together == alone


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.3}, {"min_p": 0.01}, {"top_p": 0.9}, {"top_k": 40}]
)
def test_a_seed_gives_the_same_tokens_with_and_without_the_kernel(
    changes: dict[str, Any], pytorch: pytest.MonkeyPatch
) -> None:
    """However sums are rounded: a sequence may go on where there is no kernel."""
    params = SamplingParams(**changes)
    logits = torch.randn(400, 5000, generator=torch.Generator().manual_seed(7)) * 3

    def drawn() -> list[int]:
        return tokens(logits, [state(params, at) for at in range(len(logits))])

    expected = drawn()
    pytorch.undo()
    assert drawn() == expected


def test_a_close_race_is_decided_in_float64(pytorch: pytest.MonkeyPatch) -> None:
    """Float32 totals that are wrong by far more than rounding give the same tokens."""
    logits = torch.randn(300, 9000, generator=torch.Generator().manual_seed(8)) * 3
    states = [state(SamplingParams(), at) for at in range(len(logits))]
    expected = tokens(logits, states)
    generator = torch.Generator().manual_seed(9)

    def wrong(*args: Tensor) -> Tensor:
        masses = block_masses(*args)
        return masses * (1 + 1e-3 * torch.randn(masses.shape, generator=generator))

    pytorch.setattr("winnow.sampling.draw.block_masses", wrong)
    assert tokens(logits, states) == expected
