"""Images and sound in a request are refused by name: a model takes text alone."""

from typing import Any

import pytest

from tests.services.gateway.service import MODEL_NAME, TestService

pytestmark = pytest.mark.asyncio(loop_scope="module")

PIXEL = "data:image/png;base64,iVBORw0KGgo="
SOURCE = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
IMAGE = {"type": "image", "source": SOURCE}
CHAT = "/v1/chat/completions"


def asking(first: str, part: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation whose second message has such a part behind a text."""
    text = {"type": first, "text": "What is this?"}
    return [{"role": "user", "content": "Hello"}, {"role": "user", "content": [text, part]}]


RESULT = {"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}
OUTPUT = {"type": "function_call_output", "call_id": "a"}
PARTS: list[tuple[str, dict[str, Any], str, str]] = [
    (
        CHAT,
        {"messages": asking("text", {"type": "image_url", "image_url": {"url": PIXEL}})},
        "messages[1].content[1]",
        "image_url",
    ),
    (
        CHAT,
        {
            "messages": asking(
                "text",
                {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
            )
        },
        "messages[1].content[1]",
        "input_audio",
    ),
    (
        "/v1/messages",
        {"messages": asking("text", IMAGE), "max_tokens": 4},
        "messages[1].content[1]",
        "image",
    ),
    (
        "/v1/messages",
        {"messages": asking("text", RESULT), "max_tokens": 4},
        "messages[1].content[1].content[0]",
        "image",
    ),
    (
        "/v1/responses",
        {"input": asking("input_text", {"type": "input_image", "image_url": PIXEL})},
        "input[1].content[1]",
        "input_image",
    ),
    (
        "/v1/responses",
        {"input": [OUTPUT | {"output": [{"type": "input_image", "image_url": PIXEL}]}]},
        "input[0].output[0]",
        "input_image",
    ),
]


@pytest.mark.parametrize(("path", "body", "name", "kind"), PARTS)
async def test_a_part_that_is_no_text_is_refused_by_its_name(
    service: TestService, path: str, body: dict[str, Any], name: str, kind: str
) -> None:
    answer = await service.http.post(path, json={"model": MODEL_NAME} | body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == name
    assert error["message"] == (
        f"{name} is of type {kind!r}, which is not supported by Winnow: the model takes text alone"
    )
