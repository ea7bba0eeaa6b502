"""The memory of processes over time, and whether it grows."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import linear_regression

# Pools and caches fill first; then what is fitted may grow by this share until the end.
WARM_UP = 1 / 3
MAX_GROWTH = 0.05
MIN_SAMPLES = 20


@dataclass(frozen=True)
class Trend:
    """A line through one process's memory after its warm-up."""

    start_bytes: float
    bytes_per_s: float
    seconds: float

    @property
    def growth(self) -> float:
        """By the end, as a share of what it began with."""
        return self.bytes_per_s * self.seconds / self.start_bytes

    @property
    def is_flat(self) -> bool:
        return self.growth < MAX_GROWTH


@dataclass
class Memory:
    """Samples by process, of which a name has had several when it was killed."""

    samples: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=dict)

    def add(self, name: str, pid: int, rss_bytes: int) -> None:
        self.samples.setdefault((name, pid), []).append((time.monotonic(), rss_bytes))

    def trends(self) -> dict[str, Trend]:
        """Of the process of each name that lived longest; of none that lived too short."""
        longest = sorted(self.samples.items(), key=lambda item: len(item[1]))
        return {
            name: trend(samples) for (name, _), samples in longest if len(samples) >= MIN_SAMPLES
        }


def trend(samples: Sequence[tuple[float, int]]) -> Trend:
    """Least squares, over what comes after WARM_UP of the samples."""
    rest = samples[int(len(samples) * WARM_UP) :]
    times_s, sizes = [at_s for at_s, _ in rest], [size for _, size in rest]
    slope, intercept = linear_regression(times_s, sizes)
    return Trend(intercept + slope * times_s[0], slope, times_s[-1] - times_s[0])
