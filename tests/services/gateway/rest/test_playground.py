"""The page at `/`: who gets it, what it may load, and what it asks for first."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from services.gateway.access.keys import entry_text, new_key
from tests.services.gateway.service import TestService, running_service

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Addresses(HTMLParser):
    """Addresses that a page's elements load, and styles and handlers that a policy would refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.refused: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "action"):
                self.loaded.append(value or "")
            if name == "style" or name.startswith("on"):
                self.refused.append(f"{tag} {name}")


async def test_the_page_loads_nothing_and_may_ask_only_its_service(service: TestService) -> None:
    response = await service.http.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    page = Addresses()
    page.feed(response.text)
    assert all(address.startswith("data:image/") for address in page.loaded)
    assert page.refused == []
    head = await service.http.head("/")
    assert (head.status_code, head.content) == (200, b"")


async def test_it_can_be_switched_off(model_path: Path, redis_url: str) -> None:
    off: dict[str, Any] = {"playground": False, "num_workers": 0}
    async with running_service(model_path, redis_url, **off) as service:
        assert (await service.http.get("/")).status_code == 404


async def test_it_needs_no_key_but_what_it_asks_does(
    model_path: Path, redis_url: str, tmp_path: Path
) -> None:
    _, entry = new_key("reader")
    (tmp_path / "keys.yaml").write_text(entry_text(entry))
    keys: dict[str, Any] = {"api_keys_file": tmp_path / "keys.yaml", "num_workers": 0}
    async with running_service(model_path, redis_url, **keys) as service:
        assert (await service.http.get("/")).status_code == 200
        assert (await service.http.get("/v1/models")).status_code == 401


async def test_the_model_s_card_has_what_its_sliders_need(model_path: Path, redis_url: str) -> None:
    caps: dict[str, Any] = {
        "max_kv_budget": 64,
        "pruning": {"method": "fastkv", "kv_budget": 48, "fixed_layer": 1, "window_size": 8},
        "num_workers": 0,
    }
    async with running_service(model_path, redis_url, **caps) as service:
        card = (await service.http.get("/v1/models")).json()["data"][0]["winnow"]
    assert card["pruning"]["kv_budget"] == 48
    assert card["caps"] == {"select_tokens": None, "kv_budget": 64, "decode_budget": None}
    assert (card["prefix_cache"], card["chat"]) == (False, True)
