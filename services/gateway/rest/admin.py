"""The admin API of a gateway, on its own port: metrics and detailed readiness for operators.

It needs no key and uses plain text, like every process's /metrics, so it belongs on an internal
network. The gateways of one machine share the port, so that it outlives each of them; any of them
can list the metrics endpoints of all processes.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from services.common.metrics import CONTENT_TYPE, render
from services.common.ports import listening
from services.gateway.body import Body, validate
from services.gateway.errors import as_winnow_error
from services.gateway.gateway import Gateway
from services.gateway.rest.errors import error_response
from services.gateway.rest.json_body import read_json
from winnow.errors import InvalidSetting, WinnowError

_MAX_CONNECTIONS = 64
_MAX_BODY_BYTES = 16 << 10
_GRACE_S = 1
_READ = ["GET", "HEAD"]


class LoadAdapter(Body):
    """Body of POST /adapters.  folder: an absolute path, the same for gateways and workers."""

    name: str
    folder: str


class AdminServer:
    """Start it once, then stop it."""

    def __init__(self, gateway: Gateway) -> None:
        config = uvicorn.Config(
            create_admin_api(gateway),
            log_config=None,
            access_log=False,
            lifespan="off",
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=_GRACE_S,
        )
        self._server = _Server(config)
        self._listener: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Serve on `port` (0: any free one); returns the port.  Raises InvalidSetting if taken."""
        try:
            self._listener = listening(host, port, share=True)
        except OSError as error:
            raise InvalidSetting(
                f"admin_port {port} on {host} cannot be used: {error.strerror or error}",
                param="admin_port",
            ) from error
        self._serving = asyncio.create_task(self._server.serve([self._listener]))
        return int(self._listener.getsockname()[1])

    async def stop(self) -> None:
        """Close the port; open requests have `_GRACE_S` seconds to end."""
        if self._serving is None or self._listener is None:
            return
        self._server.should_exit = True
        await self._serving
        self._listener.close()


class _Server(uvicorn.Server):
    """Uvicorn without signal handlers: the process's signals belong to Ray."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def create_admin_api(gateway: Gateway) -> FastAPI:
    """The ASGI application of the admin port."""
    api = FastAPI(title="Winnow's operators", docs_url=None, redoc_url=None, openapi_url=None)

    async def failed(_request: Request, error: Exception) -> Response:
        return error_response(as_winnow_error(error))

    api.add_exception_handler(WinnowError, failed)
    _add_state(api, gateway)
    _add_metrics(api, gateway)
    _add_adapters(api, gateway)
    return api


def _add_state(api: FastAPI, gateway: Gateway) -> None:
    @api.api_route("/health", methods=_READ)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.api_route("/ready", methods=_READ)
    async def ready() -> Response:
        readiness = await gateway.readiness()
        body = {
            "status": readiness.status,
            "decode_workers": readiness.decode_workers,
            "prefill": readiness.prefill,
            "ending": readiness.ending,
        }
        return JSONResponse(body, 200 if readiness.ready else 503)


def _add_metrics(api: FastAPI, gateway: Gateway) -> None:
    @api.get("/metrics/targets")
    async def targets() -> list[dict[str, Any]]:
        """Metrics endpoints of all processes, for Prometheus's http_sd_configs."""
        return [
            {
                "targets": [target.address],
                "labels": {"worker": target.worker_id, "__winnow_role": target.role},
            }
            for target in await gateway.targets()
        ]

    @api.get("/metrics")
    async def metrics() -> Response:
        """Metrics of the gateway that answers; Prometheus scrapes each gateway's own port."""
        return Response(render(gateway.metrics.registry), media_type=CONTENT_TYPE)


def _add_adapters(api: FastAPI, gateway: Gateway) -> None:
    adapters = gateway.adapters

    @api.get("/adapters")
    async def served() -> list[dict[str, str]]:
        found = [adapters.find(name) for name in adapters.names]
        return [asdict(ref) for ref in found if ref is not None]

    @api.post("/adapters")
    async def load(request: Request) -> Response:
        body = validate(LoadAdapter, await read_json(request, _MAX_BODY_BYTES))
        loaded = await gateway.load_adapter(body.name, body.folder)
        return JSONResponse(
            asdict(loaded.ref) | {"rank": loaded.rank, "modules": len(loaded.modules)}
        )

    @api.delete("/adapters/{name:path}")
    async def drop(name: str) -> Response:
        await adapters.drop(name)
        return Response(status_code=204)
