"""Web pages of other origins: preflights, what allowed ones may read, what others cannot send."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from services.gateway.access.keys import entry_text, new_key
from services.gateway.rest import api as rest_api
from tests.services.gateway.service import MODEL_NAME, TestService, running_service

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE, OTHER = "https://app.example.com", "https://evil.example.com"
BODY = {"model": MODEL_NAME, "prompt": "the fox", "max_tokens": 2}
ASKED_HEADERS = "authorization,content-type,x-stainless-lang"


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    """As a browser sends it; it carries no key."""
    return {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": ASKED_HEADERS,
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def key_and_service(
    model_path: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[str, TestService]]:
    """A service that wants a key and lets PAGE in."""
    key, entry = new_key("page")
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(entry_text(entry))
    origins = [PAGE, "http://localhost:3000"]
    async with running_service(
        model_path, redis_url, api_keys_file=keys, cors_allowed_origins=origins
    ) as service:
        yield key, service


@pytest.fixture
def allowing(key_and_service: tuple[str, TestService]) -> TestService:
    return key_and_service[1]


@pytest.fixture
def headers(key_and_service: tuple[str, TestService]) -> dict[str, str]:
    return {"authorization": f"Bearer {key_and_service[0]}", "origin": PAGE}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/models"])
async def test_a_preflight_of_an_allowed_origin_needs_no_key(
    allowing: TestService, path: str
) -> None:
    answer = await allowing.http.options(path, headers=preflight(PAGE))
    assert answer.is_success
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == ASKED_HEADERS
    assert "access-control-allow-credentials" not in answer.headers
    assert "Origin" in answer.headers["vary"]


async def test_a_preflight_of_another_origin_allows_nothing(allowing: TestService) -> None:
    answer = await allowing.http.options("/v1/completions", headers=preflight(OTHER))
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_an_allowed_page_may_read_answers_and_their_ids(
    allowing: TestService, headers: dict[str, str], stream: bool
) -> None:
    body = BODY | {"stream": stream}
    answer = await allowing.http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert answer.headers["vary"] == "Origin"


async def test_an_allowed_page_may_read_every_error(
    allowing: TestService, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = await allowing.http.post("/v1/completions", json={}, headers=headers)
    keyless = await allowing.http.post("/v1/completions", json=BODY, headers={"origin": PAGE})
    long = headers | {"x-long": "a" * 40_000}
    oversized = await allowing.http.post("/v1/completions", json=BODY, headers=long)
    unknown = await allowing.http.get("/v2/foo", headers=headers)

    async def broken(*_: object) -> dict[str, Any]:
        raise ZeroDivisionError

    monkeypatch.setattr(rest_api, "read_json", broken)
    with pytest.raises(ZeroDivisionError):  # told to the client, and then to the server's log
        transport = httpx.ASGITransport(rest_api.create_api(allowing.gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post("/tokenize", json={}, headers=headers)
    transport = httpx.ASGITransport(
        rest_api.create_api(allowing.gateway), raise_app_exceptions=False
    )
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        own = await client.post("/tokenize", json={}, headers=headers)
    answers = [refused, keyless, oversized, unknown, own]
    assert [answer.status_code for answer in answers] == [400, 401, 431, 404, 500]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.json()["error"]["message"]


async def test_what_another_page_gets_it_cannot_read_and_no_cache_mixes_up(
    allowing: TestService, headers: dict[str, str]
) -> None:
    for origin in (OTHER, PAGE + ".evil.com", PAGE.upper(), "null"):
        answer = await allowing.http.get("/v1/models", headers=headers | {"origin": origin})
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["vary"] == "Origin"
    del headers["origin"]
    assert (await allowing.http.get("/v1/models", headers=headers)).headers["vary"] == "Origin"


async def test_a_star_lets_every_page_in_but_no_cookies(model_path: Path, redis_url: str) -> None:
    async with running_service(
        model_path, redis_url, num_workers=0, cors_allowed_origins="*"
    ) as service:
        answer = await service.http.get("/v1/models", headers={"origin": OTHER, "cookie": "a=b"})
        asked = await service.http.options("/v1/models", headers=preflight(OTHER, "GET"))
    for headers in (answer.headers, asked.headers):
        assert headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in headers


READ_PATHS = ["/health", "/ready", "/v1/models", f"/v1/models/{MODEL_NAME}", "/openapi.json"]


@pytest.mark.parametrize("path", READ_PATHS)
async def test_head_is_answered_as_get_without_the_body(service: TestService, path: str) -> None:
    got, head = await service.http.get(path), await service.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length"):
        assert head.headers[name] == got.headers[name]


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_the_operators_probes_answer_head_too(service: TestService, path: str) -> None:
    head = await service.admin.head(path)
    assert (head.status_code, head.content) == (200, b"")


async def test_head_of_what_is_not_there_is_404_and_of_what_is_posted_405(
    service: TestService,
) -> None:
    assert (await service.http.head("/v1/models/other")).status_code == 404
    assert (await service.http.head("/v1/completions")).status_code == 405


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        *((path, {"GET", "HEAD", "OPTIONS"}) for path in READ_PATHS),
        *((path, {"POST", "OPTIONS"}) for path in ("/v1/completions", "/tokenize")),
    ],
)
async def test_options_tells_the_methods(
    service: TestService, path: str, methods: set[str]
) -> None:
    answer = await service.http.options(path)
    assert (answer.status_code, answer.content) == (204, b"")
    assert set(answer.headers["allow"].split(", ")) == methods


async def test_options_of_an_unknown_path_is_404(service: TestService) -> None:
    assert (await service.http.options("/v2/foo")).status_code == 404


JSON = b'{"model": "tiny", "prompt": "the fox", "max_tokens": 1}'
TAKEN = [
    "application/json",
    "application/json; charset=utf-8",
    'application/json;charset="UTF-8"',
    "Application/JSON",
    "application/vnd.api+json",
    "application/ld+json; charset=utf8; profile=x",
]
NOT_TAKEN = [
    "text/plain",
    "text/plain;charset=UTF-8",
    "text/plain; application/json",
    "text/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/json; charset=utf-16",
    "application/json; charset=latin-1",
    "application/jsonp",
    "application/json, text/plain",
    "application/octet-stream",
    "json",
    "",
    None,
]


@pytest.mark.parametrize("content_type", TAKEN)
async def test_json_is_taken_under_its_names(service: TestService, content_type: str) -> None:
    answer = await service.http.post(
        "/v1/completions", content=JSON, headers={"content-type": content_type}
    )
    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("content_type", NOT_TAKEN)
async def test_what_a_page_may_send_unasked_is_refused(
    service: TestService, path: str, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    answer = await service.http.post(path, content=JSON, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (415, "body_not_json")
    assert "send `content-type: application/json`" in error["message"]


async def test_two_content_types_are_none(service: TestService) -> None:
    twice = [("content-type", "application/json"), ("content-type", "text/plain")]
    answer = await service.http.post("/detokenize", content=JSON, headers=twice)
    assert answer.status_code == 415
