"""The REST API: OpenAI's completions and chat, a tokenizer, and health probes."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.tracing import context_in
from services.gateway.gateway import Gateway
from services.gateway.rest.errors import add_error_handlers
from services.gateway.rest.header_limit import HeaderLimit
from services.gateway.rest.json_body import read_json
from services.gateway.rest.key_guard import KeyGuard, key_of
from services.gateway.rest.openapi import describe
from services.gateway.rest.origins import add_origins
from services.gateway.rest.requests import OpenAIRequest, RequestReader
from services.gateway.rest.response import OpenAIResponse
from services.gateway.rest.responses import ChatFormatter, CompletionFormatter, ResponseFormatter
from services.gateway.rest.tokenize import Translation, detokenize, tokenize

_T = TypeVar("_T")
_READ = ["GET", "HEAD"]

Translate = Callable[[Gateway, Mapping[str, Any]], Translation]


def create_api(gateway: Gateway) -> FastAPI:
    """The ASGI application that serves `gateway`; the caller closes the gateway."""
    # Swagger's pages would load external scripts. FastAPI cannot see bodies that are read by hand,
    # so openapi.py describes them.
    api = FastAPI(title="Winnow", docs_url=None, redoc_url=None, openapi_url=None)
    add_error_handlers(api, gateway.metrics)
    api.add_middleware(ConnectionCloser, gateway=gateway)
    api.add_middleware(KeyGuard, access=gateway.access, metrics=gateway.metrics)
    api.add_middleware(HeaderLimit, metrics=gateway.metrics)
    _add_completions(api, gateway)
    _add_tokenizer(api, gateway)
    _add_models(api, gateway)
    _add_probes(api, gateway)
    _add_description(api, gateway)
    add_origins(api, gateway.settings.cors_allowed_origins)
    return api


def _add_completions(api: FastAPI, gateway: Gateway) -> None:
    reader = RequestReader(gateway.settings, gateway.limits, gateway.model.tokenizer)

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        parsed = await _read(gateway, request, reader.completion)
        return _response(gateway, request, parsed, CompletionFormatter)

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        parsed = await _read(gateway, request, reader.chat)
        return _response(gateway, request, parsed, ChatFormatter)


def _response(
    gateway: Gateway, request: Request, parsed: OpenAIRequest, formatter: type[ResponseFormatter]
) -> OpenAIResponse:
    model = gateway.model
    ready = formatter(parsed, model.name, model.tokenizer)
    return OpenAIResponse(gateway, parsed, ready, context_in(request.headers.items()))


def _add_tokenizer(api: FastAPI, gateway: Gateway) -> None:
    async def translated(request: Request, translate: Translate) -> Response:
        done = await _read(gateway, request, partial(translate, gateway))
        await gateway.access.charge_tokens(key_of(request.scope), done.num_tokens)
        return JSONResponse(done.answer)

    @api.post("/tokenize")
    async def tokenize_text(request: Request) -> Response:
        return await translated(request, tokenize)

    @api.post("/detokenize")
    async def detokenize_tokens(request: Request) -> Response:
        return await translated(request, detokenize)


async def _read(gateway: Gateway, request: Request, parse: Callable[[Mapping[str, Any]], _T]) -> _T:
    """Parse the request's body with `parse`, in a thread because long texts take time."""
    await gateway.access.charge_request(key_of(request.scope))
    body = await read_json(request, gateway.settings.max_body_bytes)
    return await asyncio.to_thread(parse, body)


def _add_models(api: FastAPI, gateway: Gateway) -> None:
    model = gateway.model
    card = {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "winnow",
        "max_model_len": gateway.limits.max_positions,
        "max_output_tokens": gateway.limits.max_output_tokens,
        "sampling_defaults": model.generation.told(),
    }

    @api.api_route("/v1/models", methods=_READ)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @api.api_route("/v1/models/{name:path}", methods=_READ)
    async def one_model(name: str) -> dict[str, Any]:
        gateway.limits.require_model(name)
        return card


def _add_probes(api: FastAPI, gateway: Gateway) -> None:
    """Probes need no key, so they return only a status; admin.py returns more."""

    @api.api_route("/health", methods=_READ)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.api_route("/ready", methods=_READ)
    async def ready() -> Response:
        readiness = await gateway.readiness()
        return JSONResponse({"status": readiness.status}, 200 if readiness.ready else 503)


def _add_description(api: FastAPI, gateway: Gateway) -> None:
    document = describe(gateway.model.pruning, needs_key=gateway.settings.api_keys_file is not None)

    @api.api_route("/openapi.json", methods=_READ)
    async def description() -> dict[str, Any]:
        return document


class ConnectionCloser:
    """Middleware that closes each connection after its response once the gateway is ending."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self._gateway.ending:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, send_last)
