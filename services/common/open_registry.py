"""Opens the registry that the settings select: Redis, or a Ray actor."""

from services.common.redis_access import require_redis
from services.common.redis_registry import RedisRegistry
from services.common.registry import Registry
from services.common.settings import Settings


def open_registry(settings: Settings) -> Registry:
    """The registry that the settings select.

    Raises InvalidSetting if Redis refuses this process, or if the registry is Ray's and this
    process is not part of a Ray cluster.
    """
    if settings.redis_url is not None:
        require_redis(settings)
        url = settings.redis_url.get_secret_value()
        return RedisRegistry(url, settings.namespace, settings.redis_ca_file)
    from services.common.ray_registry import open_ray_registry  # noqa: PLC0415 - Ray loads slowly

    return open_ray_registry(settings.namespace)
