"""Behind Ray Serve's own middleware, answers have one request id."""

import httpx
import pytest
from ray.serve._private.http_util import _apply_middlewares
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from winnow_serve.proxy import middlewares


@pytest.mark.parametrize("theirs", [{}, {"x-request-id": "theirs"}])
@pytest.mark.parametrize("ours", [{}, {"x-request-id": "ours"}])
async def test_an_answer_has_one_id_and_if_there_is_one_the_service_s(
    ours: dict[str, str], theirs: dict[str, str]
) -> None:
    async def service(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(headers=ours)(scope, receive, send)

    app = _apply_middlewares(service, middlewares())  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
        answer = await client.get("http://service/", headers=theirs)
    (only,) = answer.headers.get_list("x-request-id")
    assert only == (ours or theirs).get("x-request-id", only)
