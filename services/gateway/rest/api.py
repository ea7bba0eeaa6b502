"""The REST API: OpenAI's and Anthropic's endpoints, a tokenizer, and health probes."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.tracing import context_in
from services.gateway.access.pruning_caps import CAPPED
from services.gateway.access.request_limits import ANY_MODEL
from services.gateway.gateway import Gateway
from services.gateway.reads import may_have_grammar
from services.gateway.rest.errors import add_error_handlers
from services.gateway.rest.header_limit import HeaderLimit
from services.gateway.rest.json_body import read_json
from services.gateway.rest.key_guard import PROBES, KeyGuard, key_of
from services.gateway.rest.messages_format import MessagesFormatter
from services.gateway.rest.openapi import describe
from services.gateway.rest.openapi_translated import TRANSLATED_OPERATIONS
from services.gateway.rest.origins import add_origins
from services.gateway.rest.playground import add_playground
from services.gateway.rest.requests import OpenAIRequest, RequestReader
from services.gateway.rest.response import OpenAIResponse
from services.gateway.rest.responses import (
    ChatFormatter,
    CompletionFormatter,
    OpenAIFormatter,
    ResponseFormatter,
)
from services.gateway.rest.responses_format import ResponsesFormatter
from services.gateway.rest.tokenize import Translation, detokenize, tokenize
from services.gateway.rest.translate_messages import count_tokens, read_messages
from services.gateway.rest.translate_responses import read_responses

_T = TypeVar("_T")
_READ = ["GET", "HEAD"]

Translate = Callable[[Mapping[str, Any]], Translation]


def create_api(gateway: Gateway) -> FastAPI:
    """The ASGI application that serves `gateway`; the caller closes the gateway."""
    # Swagger's pages would load external scripts. FastAPI cannot see bodies that are read by hand,
    # so openapi.py describes them.
    api = FastAPI(title="Winnow", docs_url=None, redoc_url=None, openapi_url=None)
    add_error_handlers(api, gateway.metrics)
    api.add_middleware(ConnectionCloser, gateway=gateway)
    has_page = gateway.settings.playground
    open_paths = PROBES | {"/"} if has_page else PROBES
    api.add_middleware(
        KeyGuard, access=gateway.access, metrics=gateway.metrics, open_paths=open_paths
    )
    api.add_middleware(HeaderLimit, metrics=gateway.metrics)
    reader = RequestReader(
        gateway.settings, gateway.limits, gateway.model.tokenizer, gateway.grammars
    )
    _add_completions(api, gateway, reader)
    _add_translations(api, gateway, reader)
    _add_tokenizer(api, gateway, reader)
    _add_models(api, gateway)
    _add_probes(api, gateway)
    _add_description(api, gateway)
    if has_page:
        add_playground(api)
    add_origins(api, gateway.settings.cors_allowed_origins)
    return api


def _add_completions(api: FastAPI, gateway: Gateway, reader: RequestReader) -> None:
    def formatter(parsed: OpenAIRequest, cls: type[OpenAIFormatter]) -> OpenAIFormatter:
        name = parsed.generation.model_name or gateway.model.name
        return cls(parsed, name, gateway.model.tokenizer)

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        parsed = await _read(gateway, request, reader.completion)
        return _response(gateway, request, parsed, formatter(parsed, CompletionFormatter))

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        parsed = await _read(gateway, request, reader.chat)
        return _response(gateway, request, parsed, formatter(parsed, ChatFormatter))


def _add_translations(api: FastAPI, gateway: Gateway, reader: RequestReader) -> None:
    """APIs whose requests are read as chats."""

    @api.post("/v1/responses")
    async def responses(request: Request) -> Response:
        asked, parsed = await _read(gateway, request, partial(read_responses, reader))
        formatter = ResponsesFormatter(parsed, asked, gateway.model.tokenizer)
        return _response(gateway, request, parsed, formatter)

    @api.post("/v1/messages")
    async def messages(request: Request) -> Response:
        parsed = await _read(gateway, request, partial(read_messages, reader))
        return _response(gateway, request, parsed, MessagesFormatter(parsed))


def _response(
    gateway: Gateway, request: Request, parsed: OpenAIRequest, formatter: ResponseFormatter
) -> OpenAIResponse:
    return OpenAIResponse(gateway, parsed, formatter, context_in(request.headers.items()))


def _add_tokenizer(api: FastAPI, gateway: Gateway, reader: RequestReader) -> None:
    async def translated(request: Request, translate: Translate) -> Response:
        done = await _read(gateway, request, translate)
        await gateway.access.charge_tokens(key_of(request.scope), done.num_tokens)
        return JSONResponse(done.answer)

    @api.post("/tokenize")
    async def tokenize_text(request: Request) -> Response:
        return await translated(request, partial(tokenize, gateway))

    @api.post("/detokenize")
    async def detokenize_tokens(request: Request) -> Response:
        return await translated(request, partial(detokenize, gateway))

    @api.post("/v1/messages/count_tokens")
    async def count_messages_tokens(request: Request) -> Response:
        return await translated(request, partial(count_tokens, reader))


async def _read(gateway: Gateway, request: Request, parse: Callable[[Mapping[str, Any]], _T]) -> _T:
    """Parse the request's body with `parse`, in a thread because long texts take time."""
    await gateway.access.charge_request(key_of(request.scope))
    body = await read_json(request, gateway.settings.max_body_bytes)
    if may_have_grammar(body):
        return await gateway.reads.read(partial(parse, body))
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
        "winnow": {
            "pruning": asdict(model.pruning),
            "caps": {name: getattr(gateway.settings, f"max_{name}") for name in CAPPED},
            "prefix_cache": gateway.settings.prefix_cache_bytes > 0,
            "chat": model.tokenizer.has_chat_template,
        },
    }

    aliases = (name for name in gateway.settings.model_aliases if name != ANY_MODEL)
    names = tuple(dict.fromkeys((model.name, *aliases)))

    @api.api_route("/v1/models", methods=_READ)
    async def models() -> dict[str, Any]:
        own = [card | {"id": name} for name in names]
        adapted = [card | {"id": name, "parent": model.name} for name in gateway.adapters.names]
        return {"object": "list", "data": own + adapted}

    @api.api_route("/v1/models/{name:path}", methods=_READ)
    async def one_model(name: str) -> dict[str, Any]:
        adapter = gateway.limits.require_model(name)
        return card | {"id": name} | ({} if adapter is None else {"parent": model.name})


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
    needs_key = gateway.settings.api_keys_file is not None
    document = describe(gateway.model.pruning, TRANSLATED_OPERATIONS, needs_key=needs_key)

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
