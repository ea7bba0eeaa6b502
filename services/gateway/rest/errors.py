"""Errors in the formats of OpenAI's API and, for its paths, of Anthropic's."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from services.gateway.errors import public_error
from services.gateway.metrics import GatewayMetrics
from services.gateway.rest.request_ids import new_request_id, request_ids
from winnow.errors import RateLimited, WinnowError, status_of

logger = logging.getLogger(__name__)

# Memory is freed whenever an answer ends, which on a busy service is all the time.
_RETRY_AFTER_S = 1
_RETRIABLE = frozenset({429, 503})
_UNAUTHENTICATED = 401
_MESSAGES = "/v1/messages"
_LOGGED_PATH_CHARS = 200
# Anthropic's `error.type` by HTTP status; all other errors are `api_error`.
_ANTHROPIC_TYPES = {
    **dict.fromkeys((400, 405, 415, 431), "invalid_request_error"),
    _UNAUTHENTICATED: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    **dict.fromkeys((408, 504), "timeout_error"),
}


def error_object(error: WinnowError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    return {
        "error": {
            "message": error.message,
            "type": status_of(error).openai_type,
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_error(error: WinnowError, request_id: str | None = None) -> dict[str, Any]:
    """`{"type": "error", "error": {"type", "message", "param", "code"}, "request_id"}`.

    param and code are additions to Anthropic's.
    """
    problem = error_object(error)["error"]
    return _anthropic_object(problem, status_of(error).http, request_id)


def _anthropic_object(
    problem: dict[str, Any], status: int, request_id: str | None
) -> dict[str, Any]:
    told = {**problem, "type": _ANTHROPIC_TYPES.get(status, "api_error")}
    return {"type": "error", "error": told, "request_id": request_id}


def error_response(error: WinnowError, path: str = "", request_id: str | None = None) -> Response:
    """The error in the format of the path's API, with its HTTP status and the request's id.

    It has Retry-After if a retry may succeed.
    """
    status = status_of(error).http
    headers = {} if request_id is None else request_ids(request_id)
    if status in _RETRIABLE:
        wait_s = error.retry_after_s if isinstance(error, RateLimited) else _RETRY_AFTER_S
        headers["retry-after"] = str(wait_s)
    elif status == _UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    body = anthropic_error(error, request_id) if _is_messages(path) else error_object(error)
    return JSONResponse(body, status_code=status, headers=headers)


def refusal(
    error: WinnowError, metrics: GatewayMetrics, path: str, request_id: str | None = None
) -> Response:
    """`error_response` for a refused request, which is also counted in the metrics.

    request_id: None for a request that has none yet; it gets one, and a line in the log.
    """
    metrics.requests_refused.labels(error.code).inc()
    if request_id is None:
        request_id = _logged(path, f"{error.code}, {error.param}")
    return error_response(error, path, request_id)


def _logged(path: str, reason: str) -> str:
    """Log that a request is refused; returns its id."""
    request_id = new_request_id()
    about = {"request_id": request_id}
    logger.info("refused %s: %s", path[:_LOGGED_PATH_CHARS], reason, extra=about)
    return request_id


def _is_messages(path: str) -> bool:
    return path == _MESSAGES or path.startswith(f"{_MESSAGES}/")


def add_error_handlers(api: FastAPI, metrics: GatewayMetrics) -> None:
    """Give every error that leaves `api` the format of its path's API."""

    async def refused(request: Request, error: Exception) -> Response:
        return refusal(public_error(error), metrics, request.url.path)

    async def not_served(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        allowed = (error.headers or {}).get("Allow")
        if request.method == "OPTIONS" and allowed is not None:
            return Response(status_code=204, headers={"allow": f"{allowed}, OPTIONS"})
        path, status = request.url.path, error.status_code
        problem = {
            "message": f"{error.detail}: {request.method} {path}",
            "type": "invalid_request_error",
            "param": None,
            "code": "not_found" if status == 404 else "method_not_allowed",
        }
        request_id = _logged(path, f"{request.method} {problem['code']}")
        is_messages = _is_messages(path)
        body = _anthropic_object(problem, status, request_id) if is_messages else {"error": problem}
        return JSONResponse(
            body, status, headers={**(error.headers or {}), **request_ids(request_id)}
        )

    api.add_exception_handler(WinnowError, refused)
    api.add_exception_handler(HTTPException, not_served)
    api.add_exception_handler(Exception, refused)
