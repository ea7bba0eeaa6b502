import random

import pytest

from tests.soak.memory import MIN_SAMPLES, Memory, trend

MIB = 1 << 20
RNG = random.Random(3)


def samples(grows_mib_per_s: float, warm_up_mib: float = 0.0) -> list[tuple[float, int]]:
    """Ten minutes of about 500 MiB, that jump by 5 MiB and grow at first to what they are."""
    return [
        (
            3.0 * i,
            round(
                (500 + min(i / 50, 1) * warm_up_mib + RNG.uniform(-5, 5)) * MIB
                + 3 * i * grows_mib_per_s * MIB
            ),
        )
        for i in range(200)
    ]


@pytest.mark.parametrize("warm_up_mib", [0, 200])
def test_memory_that_only_warms_up_is_flat(warm_up_mib: float) -> None:
    assert trend(samples(0, warm_up_mib)).is_flat


def test_memory_that_grows_is_not_flat() -> None:
    grown = trend(samples(0.1))
    assert not grown.is_flat
    assert grown.bytes_per_s == pytest.approx(0.1 * MIB, rel=0.1)


def test_the_longest_life_of_a_process_counts() -> None:
    memory = Memory()
    for pid, num_samples in ((1, MIN_SAMPLES), (2, 3 * MIN_SAMPLES), (3, 2)):
        for _ in range(num_samples):
            memory.add("decode-1", pid, pid * MIB)
    memory.add("decode-2", 4, MIB)
    trends = memory.trends()
    assert list(trends) == ["decode-1"]
    assert trends["decode-1"].start_bytes == pytest.approx(2 * MIB)
