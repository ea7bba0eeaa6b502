"""The config file for `serve deploy`, and settings that differ on several machines."""

from typing import Any, Final

import yaml

from services.common.settings import Settings

APP_NAME = "winnow"
IMPORT_PATH = "winnow_serve:build"
EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 - listened on by a service on several machines
SERVE_LOGGING: Final[dict[str, Any]] = {"log_level": "WARNING", "enable_access_log": False}


def deploy_config(settings: Settings) -> str:
    """The YAML config for `serve deploy` to run the application on a cluster."""
    args = for_cluster(settings).model_dump(
        mode="json", exclude_defaults=True, exclude={"redis_url", "port"}
    )
    config = {
        "proxy_location": "EveryNode",
        "http_options": http_options(settings),
        "logging_config": SERVE_LOGGING,
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": args,
            }
        ],
    }
    secrets = "# Secrets are not written here: set WINNOW_REDIS_URL on the cluster's nodes.\n"
    return secrets + str(yaml.safe_dump(config, sort_keys=False))


def for_cluster(settings: Settings) -> Settings:
    """Settings whose decode workers listen on all addresses, unless `decode_host` was set."""
    if "decode_host" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"decode_host": EVERY_ADDRESS})


def http_options(settings: Settings) -> dict[str, Any]:
    """HTTP options of Serve's proxy: address and TLS files."""
    options: dict[str, Any] = {"host": settings.host, "port": settings.port}
    if settings.tls_cert_file is not None:
        options["ssl_certfile"] = str(settings.tls_cert_file)
        options["ssl_keyfile"] = str(settings.tls_key_file)
    return options
