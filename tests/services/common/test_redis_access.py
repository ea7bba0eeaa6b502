"""A Redis with password and TLS: who is let in, and what is said to who is not."""

import logging
from pathlib import Path

import pytest
import trustme

from services.common.open_registry import open_registry
from services.common.ports import free_port
from services.common.redis_access import require_redis
from services.common.registry import MetricsTarget
from services.common.settings import Settings
from services.gateway.access.keys import ApiKey
from services.gateway.access.rate_limits import RateLimits
from tests.e2e.winnow_process import winnow
from tests.guarded_redis import GuardedRedis
from winnow.errors import InvalidSetting, RateLimited

WRONG = "hunter2"
TARGET = MetricsTarget("worker-1", "10.0.0.1:9400", "decode", "tiny")


async def test_registers_over_tls_with_a_password(guarded: GuardedRedis) -> None:
    registry = open_registry(guarded.settings())
    await registry.put(TARGET, lease_s=30)
    assert await registry.targets() == [TARGET]
    await registry.remove(TARGET.worker_id)
    await registry.close()


async def test_counts_rate_limits_over_tls_with_a_password(
    guarded: GuardedRedis, caplog: pytest.LogCaptureFixture
) -> None:
    key = ApiKey(name="few", sha256="0" * 64, requests_per_minute=1)
    gateways = [RateLimits(guarded.settings()) for _ in range(2)]
    await gateways[0].charge(key, "requests", 1, 1)
    with pytest.raises(RateLimited):
        await gateways[1].charge(key, "requests", 1, 1)
    assert "not counted" not in caplog.text
    for gateway in gateways:
        await gateway.close()


def test_a_wrong_password_is_refused_and_not_shown(
    guarded: GuardedRedis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(InvalidSetting) as refused:
        open_registry(guarded.settings(WRONG))
    assert refused.value.message == "Redis does not take the name and password of redis_url"
    assert WRONG not in caplog.text


async def test_rate_limits_do_not_log_a_wrong_password(
    guarded: GuardedRedis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = ApiKey(name="few", sha256="0" * 64, requests_per_minute=1)
    limits = RateLimits(guarded.settings(WRONG))
    await limits.charge(key, "requests", 1, 1)
    await limits.close()
    assert "rate limits are not counted" in caplog.text
    assert WRONG not in caplog.text


def test_a_certificate_of_a_stranger_is_not_trusted(guarded: GuardedRedis, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    for settings in (
        Settings(redis_url=guarded.url(), redis_ca_file=other),
        Settings(redis_url=guarded.url()),
    ):
        with pytest.raises(InvalidSetting, match="Redis' certificate is not trusted: self-signed"):
            require_redis(settings)


def test_a_certificate_of_another_name_is_not_trusted(guarded: GuardedRedis) -> None:
    with pytest.raises(InvalidSetting, match="not trusted: IP address mismatch"):
        require_redis(guarded.settings(host="127.0.0.1"))


def test_an_authority_that_is_no_use_is_named(guarded: GuardedRedis, tmp_path: Path) -> None:
    missing = tmp_path / "none.pem"
    with pytest.raises(InvalidSetting, match=r"none\.pem cannot be used: No such file"):
        require_redis(Settings(redis_url=guarded.url(), redis_ca_file=missing))
    with pytest.raises(ValueError, match="does not begin with rediss://"):
        Settings(redis_url="redis://localhost", redis_ca_file=guarded.ca_file)


def test_a_redis_that_is_away_may_come_later(caplog: pytest.LogCaptureFixture) -> None:
    require_redis(Settings(redis_url=f"redis://:{WRONG}@127.0.0.1:{free_port()}/0"))
    assert "Redis does not answer" in caplog.text
    assert WRONG not in caplog.text


@pytest.mark.e2e
def test_a_worker_with_a_wrong_password_ends_with_one_clear_line(guarded: GuardedRedis) -> None:
    done = winnow(
        "decode",
        WINNOW_REDIS_URL=guarded.url(WRONG),
        WINNOW_REDIS_CA_FILE=str(guarded.ca_file),
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == "winnow: Redis does not take the name and password of redis_url"
    assert WRONG not in done.stderr + done.stdout
