"""Reads request bodies: size and time limits, and strict parsing of JSON."""

import asyncio
import logging
import re
from email.message import Message
from typing import Any

from starlette.requests import ClientDisconnect, Request

from services.gateway.json_text import parse_object
from winnow.errors import (
    BodyEncoded,
    BodyNotJson,
    BodyTooLarge,
    BodyTooSlow,
    RequestCancelled,
)

logger = logging.getLogger(__name__)

# A client that is still sending may not read the response; up to this much of the rest of its body
# is read and discarded first.
_DISCARDED_BYTES = 64 << 20
_DISCARD_TIMEOUT_S = 0.5
# Enough for the largest body allowed on a slow connection; a trickling client is cut off.
BODY_TIMEOUT_S = 60.0
_PLAIN = "identity"
_JSON = re.compile(r"application/(json|[a-z0-9!#$&^_.-]+\+json)")
_CHARSETS = (None, "utf-8", "utf8")


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the request's body.

    Raises BodyNotJson unless the headers declare JSON, BodyEncoded for a compressed body (a few
    bytes could fill the memory when decompressed), BodyTooLarge as soon as more than `max_bytes`
    are announced or received, BodyTooSlow after BODY_TIMEOUT_S, and InvalidRequest for anything but
    a JSON object in UTF-8.
    """
    _require_json_type(request.headers.getlist("content-type"))
    encoding = request.headers.get("content-encoding", _PLAIN)
    if encoding.lower() != _PLAIN:
        raise BodyEncoded(f"content-encoding {encoding!r} is not taken; send the body as it is")
    return parse_object(await read_body(request, max_bytes), "body")


def _require_json_type(types: list[str]) -> None:
    """Refuse other types and a missing one: web pages may send those without a CORS preflight."""
    message = Message()
    message["content-type"] = types[0] if len(types) == 1 else ""
    is_json = _JSON.fullmatch(message.get_content_type()) is not None
    if not is_json or message.get_content_charset() not in _CHARSETS:
        shown = ", ".join(types) or "missing"
        raise BodyNotJson(f"content-type is {shown[:100]}; send `content-type: application/json`")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body.  Raises BodyTooLarge, BodyTooSlow, or RequestCancelled on a disconnect."""
    announced = int(request.headers.get("content-length") or 0)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = None if announced > max_bytes else await _read_up_to(request, max_bytes)
    except TimeoutError as error:
        raise BodyTooSlow(f"the body did not come within {BODY_TIMEOUT_S:g} seconds") from error
    if body is not None:
        return body
    await _discard(request)
    size = f"{announced:,}" if announced else f"more than {max_bytes:,}"
    raise BodyTooLarge(f"body has {size} bytes; the limit is {max_bytes:,}")


async def _read_up_to(request: Request, max_bytes: int) -> bytes | None:
    """The whole body; None as soon as it exceeds `max_bytes`."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                return None
    except ClientDisconnect as error:
        raise RequestCancelled("the client went away while it sent the body") from error
    return bytes(body)


async def _discard(request: Request) -> None:
    discarded = 0
    try:
        async with asyncio.timeout(_DISCARD_TIMEOUT_S):
            while discarded < _DISCARDED_BYTES:
                message = await request.receive()
                discarded += len(message.get("body", b""))
                if not message.get("more_body"):
                    return
    except TimeoutError:
        logger.debug("a client goes on sending a body that is too large")
