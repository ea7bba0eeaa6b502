"""anthropic: a streamed call of a tool, its result, and a count of tokens."""

import json
import sys
from typing import Any

from anthropic import Anthropic

TOOL = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]}},
        "required": ["city"],
    },
}


def main(url: str) -> None:
    client: Any = Anthropic(base_url=url, api_key="none")
    asked = {"role": "user", "content": "How is it in Rome?"}
    with client.messages.stream(
        model="winnow-tiny",
        max_tokens=100,
        messages=[asked],
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        extra_body={"temperature": 0},
    ) as stream:
        events = sorted({event.type for event in stream})
        called = stream.get_final_message()
    uses = [block for block in called.content if block.type == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"} for use in uses]
    messages = [
        asked,
        {"role": "assistant", "content": [block.to_dict() for block in called.content]},
        {"role": "user", "content": results},
    ]
    answered = client.messages.create(
        model="winnow-tiny", max_tokens=8, messages=messages, tools=[TOOL]
    )
    counted = client.messages.count_tokens(model="winnow-tiny", messages=messages, tools=[TOOL])
    said = {
        "stop_reason": called.stop_reason,
        "uses": [[use.name, use.input] for use in uses],
        "events": events,
        "answered": answered.stop_reason,
        "counted": counted.input_tokens == answered.usage.input_tokens,
    }
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
