"""Which web pages may call the API from a browser (CORS)."""

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

_METHODS = ("GET", "HEAD", "POST")
_EXPOSED = ("x-request-id", "retry-after")


def add_origins(api: FastAPI, origins: Sequence[str]) -> None:
    """Lets pages of `origins` in; call it last.

    Around all other middleware, so that preflights, which carry no key, are answered, and errors of
    any kind can be read by the page. Never with credentials: a key is a header that the page sets.
    """
    if origins:
        api.middleware_stack = CORSMiddleware(
            api.build_middleware_stack(),
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=("*",),
            expose_headers=_EXPOSED,
        )
