"""Access to Redis: connection options, password and TLS, and errors that name the cause."""

import logging
import ssl
from pathlib import Path
from typing import Any, TypeAlias

import redis
from redis import RedisError
from redis.asyncio import ConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError
from redis.retry import Retry

from services.common.settings import Settings
from winnow.errors import InvalidSetting

logger = logging.getLogger(__name__)

RedisPool: TypeAlias = ConnectionPool

_TIMEOUT_S = 2.0


def malformed_url() -> InvalidSetting:
    return InvalidSetting(
        "setting redis_url: it must be like redis://host:6379/0", param="redis_url"
    )


def redis_options(ca_file: Path | None, timeout_s: float) -> dict[str, Any]:
    """Options for every connection to Redis."""
    trust = {} if ca_file is None else {"ssl_ca_certs": str(ca_file)}
    return {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, **trust}


def open_redis_pool(settings: Settings, timeout_s: float) -> RedisPool | None:
    """A connection pool to the registry's Redis for another use; None without Redis.

    The caller closes it.  Raises InvalidSetting for a malformed URL.
    """
    if settings.redis_url is None:
        return None
    url = settings.redis_url.get_secret_value()
    try:
        return ConnectionPool.from_url(url, **redis_options(settings.redis_ca_file, timeout_s))
    except ValueError as error:
        raise malformed_url() from error


def require_redis(settings: Settings) -> None:
    """Raises InvalidSetting if Redis answers but refuses this process: the settings are wrong.

    A Redis that does not answer is only logged, since it may come back.  No-op without Redis.
    """
    if settings.redis_url is None:
        return
    _require_certificates(settings.redis_ca_file)
    try:
        client = redis.Redis.from_url(
            settings.redis_url.get_secret_value(),
            retry=Retry(NoBackoff(), 0),
            **redis_options(settings.redis_ca_file, _TIMEOUT_S),
        )
    except ValueError as error:
        raise malformed_url() from error
    with client:
        try:
            client.ping()
        except AuthenticationError as error:
            raise InvalidSetting(
                "Redis does not take the name and password of redis_url", param="redis_url"
            ) from error
        except RedisError as error:
            if (untrusted := _untrusted(error)) is not None:
                raise InvalidSetting(
                    f"Redis' certificate is not trusted: {untrusted.verify_message}; its authority "
                    "is named by redis_ca_file",
                    param="redis_ca_file",
                ) from error
            logger.warning("Redis does not answer: %s", error)


def _require_certificates(ca_file: Path | None) -> None:
    """Check the file here: redis-py would not report a bad one while Redis is unavailable."""
    try:
        ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidSetting(
            f"redis_ca_file {ca_file} cannot be used: {reason}", param="redis_ca_file"
        ) from error


def _untrusted(error: RedisError) -> ssl.SSLCertVerificationError | None:
    """The certificate error that redis-py shows only as a cause of `error`, if there is one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return cause
