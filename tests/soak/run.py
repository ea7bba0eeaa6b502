"""One soak: load and faults side by side, memory watched, everything counted at the end."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tests.chaos.victim import Victim
from tests.soak.faults import LONG_LIVED, random_faults
from tests.soak.load import KINDS, Load, Outcome
from tests.soak.memory import MAX_GROWTH, Memory

_SAMPLE_S = 3.0
_MAX_PAUSE_S = 10.0
_MAX_FAILURES_SHOWN = 20


@dataclass(frozen=True)
class Plan:
    """Ends after `minutes`, or when `max_requests` have been asked."""

    minutes: float
    max_requests: int
    num_clients: int
    seed: int


@dataclass(frozen=True)
class Report:
    seconds: float
    load: Load
    faults: Counter[str]
    memory: Memory

    @property
    def passed(self) -> bool:
        outcomes, trends = self.load.outcomes, self.memory.trends()
        none_failed = not outcomes[Outcome.LOST] and not outcomes[Outcome.WRONG]
        served = bool(outcomes[Outcome.DONE]) and trends.keys() >= {*LONG_LIVED}
        return none_failed and served and all(trend.is_flat for trend in trends.values())

    def lines(self) -> Iterator[str]:
        load = self.load
        asked = load.by_kind.total()
        yield (
            f"{asked} requests of {len(KINDS)} kinds in {self.seconds / 60:.1f} min "
            f"({asked / self.seconds:.2f}/s), {load.num_tokens} chunks of answers"
        )
        yield from (f"  {outcome}: {load.outcomes[outcome]}" for outcome in Outcome)
        yield f"{self.faults.total()} faults survived"
        yield from (f"  {fault}: {count}" for fault, count in sorted(self.faults.items()))
        yield f"memory, after the first third; flat is less than {MAX_GROWTH:.0%} to the end"
        for name in sorted({*LONG_LIVED} - self.memory.trends().keys()):
            yield f"  {name}: no life was long enough to judge"
        for name, trend in sorted(self.memory.trends().items()):
            yield (
                f"  {name}: {trend.start_bytes / 2**20:.0f} MiB, {trend.growth:+.1%} in "
                f"{trend.seconds / 60:.1f} min: {'flat' if trend.is_flat else 'GROWS'}"
            )
        yield from load.failures[:_MAX_FAILURES_SHOWN]


async def soak(victim: Victim, plan: Plan) -> Report:
    """Raises AssertionError if anything is still held at the end."""
    load, memory = Load(f"{victim.url}/v1", plan.max_requests), Memory()
    stopped = asyncio.Event()
    await load.learn()
    started_s = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        clients = [
            tasks.create_task(load.run_client(random.Random(f"{plan.seed}/{idx}"), stopped))
            for idx in range(plan.num_clients)
        ]
        sampling = tasks.create_task(_sample(victim, memory))
        failing = tasks.create_task(_fail(victim, plan, stopped))
        await asyncio.wait(clients, timeout=plan.minutes * 60)
        stopped.set()
        await asyncio.wait(clients)
        faults = await failing
        sampling.cancel()
    seconds = time.monotonic() - started_s
    await load.close()
    await asyncio.to_thread(victim.require_idle)
    await asyncio.to_thread(victim.require_as_before)
    return Report(seconds, load, faults, memory)


async def _sample(victim: Victim, memory: Memory) -> None:
    while True:
        for name, pid, rss_bytes in await asyncio.to_thread(victim.sizes):
            memory.add(name, pid, rss_bytes)
        await asyncio.sleep(_SAMPLE_S)


async def _fail(victim: Victim, plan: Plan, stopped: asyncio.Event) -> Counter[str]:
    """One fault after the other, with pauses; returns what befell."""
    done: Counter[str] = Counter()
    rng, half_time_s = random.Random(plan.seed), time.monotonic() + plan.minutes * 60 / 2
    for fault in random_faults(rng):
        if fault.is_spared_late and time.monotonic() > half_time_s:
            continue
        try:
            async with asyncio.timeout(rng.uniform(0, _MAX_PAUSE_S)):
                await stopped.wait()
            return done
        except TimeoutError:
            await asyncio.to_thread(fault.befall, victim)
            done[f"{fault.what} {fault.target}"] += 1
    raise AssertionError("faults do not end")
