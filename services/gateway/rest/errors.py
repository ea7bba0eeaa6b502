"""Errors in the format of OpenAI's API."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from services.gateway.errors import public_error
from services.gateway.metrics import GatewayMetrics
from winnow.errors import RateLimited, WinnowError, status_of

logger = logging.getLogger(__name__)

# Memory is freed whenever an answer ends, which on a busy service is all the time.
_RETRY_AFTER_S = 1
_RETRIABLE = frozenset({429, 503})
_UNAUTHENTICATED = 401


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


def error_response(error: WinnowError) -> Response:
    """The error with its HTTP status, and Retry-After if a retry may succeed."""
    status = status_of(error).http
    headers = {}
    if status in _RETRIABLE:
        wait_s = error.retry_after_s if isinstance(error, RateLimited) else _RETRY_AFTER_S
        headers["retry-after"] = str(wait_s)
    elif status == _UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_object(error), status_code=status, headers=headers)


def refusal(error: WinnowError, metrics: GatewayMetrics) -> Response:
    """`error_response` for a refused request, which is also counted in the metrics."""
    metrics.requests_refused.labels(error.code).inc()
    return error_response(error)


def add_error_handlers(api: FastAPI, metrics: GatewayMetrics) -> None:
    """Give every error that leaves `api` the format of OpenAI's API."""

    async def refused(request: Request, error: Exception) -> Response:
        typed = public_error(error)
        logger.info("refused %s: %s, %s", request.url.path, typed.code, typed.param)
        return refusal(typed, metrics)

    async def not_served(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        allowed = (error.headers or {}).get("Allow")
        if request.method == "OPTIONS" and allowed is not None:
            return Response(status_code=204, headers={"allow": f"{allowed}, OPTIONS"})
        body = {
            "message": f"{error.detail}: {request.method} {request.url.path}",
            "type": "invalid_request_error",
            "param": None,
            "code": "not_found" if error.status_code == 404 else "method_not_allowed",
        }
        return JSONResponse({"error": body}, error.status_code, headers=dict(error.headers or {}))

    api.add_exception_handler(WinnowError, refused)
    api.add_exception_handler(HTTPException, not_served)
    api.add_exception_handler(Exception, refused)
