"""The page at `/`."""

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

from services.playground.page import playground


def add_playground(api: FastAPI) -> None:
    """Serve the page, which asks this service by its API."""
    page = playground()

    @api.api_route("/", methods=["GET", "HEAD"])
    async def show() -> Response:
        return HTMLResponse(page.html, headers=dict(page.headers))
