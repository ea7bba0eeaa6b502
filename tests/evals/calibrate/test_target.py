import pytest

from evals.calibrate.target import Target, Tradeoff, parse_share
from winnow.errors import InvalidSetting

TRIED = [Tradeoff(0.9, 0.5), Tradeoff(0.98, 0.7), Tradeoff(0.97, 0.65), Tradeoff(1.0, 0.8)]


def best(target: Target) -> Tradeoff | None:
    return target.best(TRIED, lambda one: one)


def test_the_least_prefill_that_keeps_enough() -> None:
    assert best(Target(0.97, None)) == Tradeoff(0.97, 0.65)
    assert best(Target(0.99, None)) == Tradeoff(1.0, 0.8)


def test_the_best_score_at_so_much_prefill() -> None:
    assert best(Target(None, 0.7)) == Tradeoff(0.98, 0.7)
    assert best(Target(None, 0.5)) == Tradeoff(0.9, 0.5)


def test_what_nothing_reaches_is_none() -> None:
    assert best(Target(None, 0.4)) is None
    assert Target(1.01, None).best(TRIED, lambda one: one) is None


@pytest.mark.parametrize(
    ("text", "value"), [("97%", 0.97), ("0.97", 0.97), (".5", 0.5), ("62.5%", 0.625), ("100%", 1)]
)
def test_shares(text: str, value: float) -> None:
    assert parse_share("keep", text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["0%", "101%", "97", "-3%", "much", "", "0", "1.2"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(InvalidSetting, match=r"--keep .* is not a share like 65%"):
        parse_share("keep", text)


def test_what_misses_the_target_is_worse_and_nothing_is_worst() -> None:
    keep, prefill = Target(0.97, None), Target(None, 0.6)
    assert keep.prefers(Tradeoff(0.97, 0.9), Tradeoff(0.96, 0.3))
    assert keep.prefers(Tradeoff(0.96, 0.9), Tradeoff(0.95, 0.3))
    assert prefill.prefers(Tradeoff(0.4, 0.6), Tradeoff(0.9, 0.61))
    assert prefill.prefers(Tradeoff(0.9, 0.6), Tradeoff(0.8, 0.5))
    assert keep.prefers(Tradeoff(0.0, 1.0), None)
    assert not keep.prefers(None, None)
    assert not keep.prefers(Tradeoff(0.98, 0.5), Tradeoff(0.98, 0.5))
