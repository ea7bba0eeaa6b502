"""CORS: the web pages that may call the API from a browser."""

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

_METHODS = ("GET", "HEAD", "POST")
_EXPOSED = ("x-request-id", "request-id", "retry-after")


def add_origins(api: FastAPI, origins: Sequence[str]) -> None:
    """Allow pages of `origins`; call it after adding all other middleware.

    It wraps all of it, so that preflights, which carry no key, are answered, and pages can read
    every error. Credentials are never allowed: the page sends a key as a header.
    """
    if origins:
        api.middleware_stack = CORSMiddleware(
            api.build_middleware_stack(),
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=("*",),
            expose_headers=_EXPOSED,
        )
