"""The lifecycle of `winnow serve`: check, start, report readiness, drain, stop everything.

Without RAY_ADDRESS it starts its own Ray on this machine and stops it at the end. With RAY_ADDRESS
the application runs on that cluster and is deleted from it at the end.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from services.cli.fetch import with_fetched_model
from services.cli.signals import StopSignals
from services.common.ports import free_port, listening
from services.common.settings import Settings
from services.deploy_config import APP_NAME, EVERY_ADDRESS, SERVE_LOGGING, for_cluster, http_options
from winnow.errors import InvalidSetting, UnusableModel, WinnowError
from winnow.folder_errors import as_unusable

RAY_ADDRESS = "RAY_ADDRESS"

_POLL_S = 0.25
_FAILED_TO_START = "failed to start"  # in Serve's message about a deployment
_OBJECT_STORE_BYTES = 80 << 20  # just above Ray's minimum: no tensor goes through it

# Read by Ray and Serve at import, and by every process they start.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # half the time and CPU per hop
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",  # default: 5, three times; too short under load
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "winnow_serve.proxy.middlewares",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # at the default of 0.1 it is never idle
}

# If any of these is set, the operator controls access to Ray.
_RAY_ACCESS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

Progress = Callable[[str], None]


def run_service(settings: Settings, progress: Progress, ready: Callable[[Settings], None]) -> None:
    """Serve until SIGINT or SIGTERM, then drain and stop. A second signal cuts the drain short.

    `progress` gets each step of startup and shutdown; `ready` is called once requests are served.
    Raises UnusableModel or InvalidSetting if it cannot start; nothing is left running then.
    """
    settings = with_ports(settings)
    with StopSignals() as signals, contextlib.suppress(KeyboardInterrupt):
        settings = with_fetched_model(settings, signals.check)
        _check_at_once(settings)
        with _ray(settings, progress, signals), _application(settings, progress, signals):
            _wait_until_served(settings, progress, signals)
            ready(settings)
            signals.wait()
            signals.raise_next()
            if signals.number == signal.SIGTERM:
                _send_clients_elsewhere(settings, progress)


def with_ports(settings: Settings) -> Settings:
    """`settings` with free ports in place of 0.  Raises InvalidSetting if a port is taken."""
    ports: dict[str, int] = {}
    hosts = {"port": settings.host, "grpc_port": settings.host, "admin_port": settings.decode_host}
    with contextlib.ExitStack() as held:  # held open, so that no two of them are the same
        for name, host in hosts.items():
            wanted = getattr(settings, name)
            if wanted is not None:
                ports[name] = wanted or free_port(host)
                held.enter_context(_claim(host, ports[name], name))
    return settings.model_copy(update=ports)


def _claim(host: str, port: int, name: str) -> socket.socket:
    try:
        return listening(host, port)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidSetting(
            f"{name} {port} on {host} cannot be used: {reason}", param=name
        ) from error


def _check_at_once(settings: Settings) -> None:
    """Check what needs no torch, which takes as long to load as Ray takes to start."""
    from services.common.redis_access import require_redis  # noqa: PLC0415 - loads Redis' client
    from services.common.tls import PeerTls, public_credentials  # noqa: PLC0415 - loads gRPC
    from winnow.model_path import model_path, require_config  # noqa: PLC0415 - loads numpy

    with as_unusable(f"model {settings.model_source} cannot be read"):
        if (path := model_path(settings.model_source)).is_dir():
            require_config(path)
    public_credentials(settings)
    PeerTls.load(settings)
    require_redis(settings)


def _check(settings: Settings) -> None:
    from services.gateway.served_adapters import require_adapters  # noqa: PLC0415 - loads torch
    from services.gateway.served_model import ServedModel  # noqa: PLC0415 - loads transformers
    from winnow.checkpoint import open_checkpoint, require_sound  # noqa: PLC0415 - loads transformers

    description = ServedModel.load(settings).description
    require_sound(open_checkpoint(description))
    require_adapters(settings, description)


def require_gpus(settings: Settings, found: float) -> None:
    """Raise InvalidSetting if the workers need more GPUs than Ray has found on this machine.

    Ray would wait for them.
    """
    wanted = settings.prefill_replicas * settings.gpus_per_worker(settings.prefill_ranks)
    wanted += settings.decode_workers * settings.gpus_per_worker(settings.decode_ranks)
    if round(wanted, 4) > found:  # as Ray counts
        raise InvalidSetting(
            f"prefill and decode workers need {wanted:g} GPUs, worker_num_gpus for each; this "
            f"machine has {found:g}",
            param="worker_num_gpus",
        )


@contextlib.contextmanager
def _ray(settings: Settings, progress: Progress, signals: StopSignals) -> Iterator[None]:
    """Connect this process as a driver to RAY_ADDRESS's cluster, or to its own temporary one.

    The model's files are checked meanwhile, because loading torch takes as long as starting Ray.
    """
    progress("starting Ray")
    is_own = not os.environ.get(RAY_ADDRESS)
    for name, value in (_RAY_ENVIRONMENT | (_own_access() if is_own else {})).items():
        os.environ.setdefault(name, value)
    import ray  # noqa: PLC0415 - reads its environment at import

    own = _own_cluster(settings) if is_own else {}
    try:
        # Workers import first from the folder in which Ray is started. It is an empty one: a folder
        # `winnow` in the current one would shadow the module of that name.
        with tempfile.TemporaryDirectory(prefix="winnow-") as empty:
            with ThreadPoolExecutor(1) as thread:
                checked = thread.submit(_check, settings)
                with contextlib.chdir(empty):
                    ray.init(logging_level=logging.ERROR, log_to_driver=True, **own)
                signals.listen()  # Ray has installed its own handler
                checked.result()
                if is_own:
                    require_gpus(settings, ray.cluster_resources().get("GPU", 0))
            signals.check()
            yield
    except SystemExit as error:  # how Ray handles a SIGTERM while it starts
        raise KeyboardInterrupt from error
    except ConnectionError as error:
        raise InvalidSetting(f"RAY_ADDRESS cannot be reached: {error}") from error
    finally:
        signals.ignore()  # an interrupted shutdown would leave processes behind
        progress("stopping Ray")
        ray.shutdown()


def _own_access() -> dict[str, str]:
    """Token that Ray requires of every caller: some of its ports listen on all addresses.

    It is valid as long as the cluster and passed in the environment of Ray's processes; Ray's own
    way would store it in a file that other users of the machine can read.
    """
    if any(name in os.environ for name in _RAY_ACCESS):
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _own_cluster(settings: Settings) -> dict[str, Any]:
    """Ray options with CPUs for every replica, even if that exceeds the machine's cores."""
    wanted = (
        settings.prefill_replicas * settings.prefill_num_cpus
        + settings.decode_workers * settings.decode_num_cpus
        + settings.gateway_replicas * settings.gateway_num_cpus
    )
    return {
        "address": "local",
        "num_cpus": max(len(os.sched_getaffinity(0)), int(wanted + 1)),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }


@contextlib.contextmanager
def _application(settings: Settings, progress: Progress, signals: StopSignals) -> Iterator[None]:
    """Deploy the application and wait for every replica; drain and delete it at the end."""
    from ray import serve  # noqa: PLC0415 - reads its environment at import

    from services.app import build_app  # noqa: PLC0415

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    own = not os.environ.get(RAY_ADDRESS)
    location = "HeadOnly" if own else "EveryNode"
    quiet = SERVE_LOGGING | {"log_level": "CRITICAL"} if own else SERVE_LOGGING
    serve.start(location, http_options(settings), logging_config=quiet)
    running = False
    try:
        app = build_app(settings if own else for_cluster(settings))
        target = serve.RunTarget(app, name=APP_NAME, route_prefix="/", logging_config=SERVE_LOGGING)
        serve.run_many([target], wait_for_applications_running=False)
        _wait_until_running(settings.start_timeout_s, progress, signals)
        if own:
            _let_serve_speak()
        running = True
        yield
    finally:
        if running or not own:  # if it never served there is nothing to drain; Ray's end stops all
            progress("draining")
            serve.delete(APP_NAME)
            _remove_registry(settings)


def _let_serve_speak() -> None:
    """Restore the log level of Serve's controller, which is silent during startup.

    It logs a replica's constructor error with the tracebacks of three processes, where
    `_wait_until_running` reports it in one line.
    """
    from ray.serve.context import _get_global_client  # noqa: PLC0415 - as for serve
    from ray.serve.schema import LoggingConfig  # noqa: PLC0415

    controller: Any = _get_global_client()
    controller.update_global_logging_config(LoggingConfig(**SERVE_LOGGING))


def _send_clients_elsewhere(settings: Settings, progress: Progress) -> None:
    """Have every gateway announce its shutdown; returns after `drain_notice_s`.

    Only on SIGTERM, which stops one of several instances: after Ctrl-C the wait would be useless.
    """
    from ray import serve  # noqa: PLC0415 - reads its environment at import

    if not settings.drain_notice_s:
        return
    progress("sending clients elsewhere")
    end_s = time.monotonic() + settings.drain_notice_s
    handle = serve.get_app_handle(APP_NAME)
    told: set[str] = set()
    while len(told) < settings.gateway_replicas and (left_s := end_s - time.monotonic()) > 0:
        with contextlib.suppress(TimeoutError):
            told.add(handle.announce_end.remote().result(timeout_s=left_s))
    time.sleep(max(0.0, end_s - time.monotonic()))


def _remove_registry(settings: Settings) -> None:
    if settings.redis_url is None:
        from services.common.ray_registry import remove_ray_registry  # noqa: PLC0415 - loads Ray

        remove_ray_registry(settings.namespace)


def _wait_until_running(timeout_s: float, progress: Progress, signals: StopSignals) -> None:
    """Wait until all replicas run.  Raises as soon as one cannot start, with a one-line reason."""
    from ray import serve  # noqa: PLC0415 - reads its environment at import

    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        app = serve.status().applications[APP_NAME]
        if app.status == "RUNNING":
            return
        for name, deployment in app.deployments.items():
            _raise_failure(name, deployment.message)
        if app.status == "DEPLOY_FAILED":
            raise InvalidSetting(f"the service cannot start: {app.message}")
        progress(f"starting workers: {_states(app.deployments)}")
        signals.check(_POLL_S)
    raise InvalidSetting(
        f"the workers did not start within {timeout_s:g} seconds (start_timeout_s)",
        param="start_timeout_s",
    )


def _states(deployments: dict[str, Any]) -> str:
    def count(deployment: Any) -> str:  # noqa: ANN401 - Ray's
        running = sum(n for state, n in deployment.replica_states.items() if state == "RUNNING")
        return f"{running}/{sum(deployment.replica_states.values())}"

    return ", ".join(f"{name} {count(deployment)}" for name, deployment in deployments.items())


def _raise_failure(name: str, message: str) -> None:
    """Raise the error of a replica's constructor, parsed from the traceback in Serve's message.

    At the first failure: Serve's retries would only fail again, later.
    """
    for line in message.splitlines():
        for cls in (UnusableModel, InvalidSetting, WinnowError):
            _, found, reason = line.partition(f"{cls.__module__}.{cls.__name__}: ")
            if found:
                raise cls(f"{name} cannot start: {reason}")
    if _FAILED_TO_START in message:
        *_, last = filter(None, map(str.strip, message.splitlines()))
        raise WinnowError(f"{name} cannot start: {last}")


def _wait_until_served(settings: Settings, progress: Progress, signals: StopSignals) -> None:
    """Wait until the gateway is ready, which means that all parts have found each other."""
    from services.common.tls import own_verification  # noqa: PLC0415 - loads gRPC

    progress("waiting until the gateway is ready")
    host = "127.0.0.1" if settings.host == EVERY_ADDRESS else settings.host
    url = f"{settings.scheme}://{host}:{settings.port}/ready"
    verify = own_verification(settings)
    while not _answers(url, verify):
        signals.check(_POLL_S)


def _answers(url: str, verify: ssl.SSLContext | bool) -> bool:
    try:
        return httpx.get(url, timeout=5, verify=verify).is_success
    except httpx.TransportError:  # not listening yet
        return False
