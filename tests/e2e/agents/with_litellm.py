"""LiteLLM: a call of a tool, streamed and whole, and a schema."""

import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}},
    "required": ["city"],
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}


def main(url: str) -> None:
    asked: dict[str, Any] = {
        "model": "openai/winnow-tiny",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": "How is it in Rome?"}],
        "temperature": 0,
        "max_tokens": 100,
    }
    one_call: dict[str, Any] = {"tools": [TOOL], "parallel_tool_calls": False}
    named = {"type": "function", "function": {"name": "weather"}}
    whole = litellm.completion(**asked, **one_call, tool_choice=named)
    chunks = list(litellm.completion(**asked, **one_call, tool_choice="required", stream=True))
    rebuilt = litellm.stream_chunk_builder(chunks)
    schema = {"name": "place", "schema": PARAMETERS, "strict": True}
    form = {"type": "json_schema", "json_schema": schema}
    said = {
        "whole": calls(whole),
        "streamed": calls(rebuilt),
        "schema": json.loads(
            litellm.completion(**asked, response_format=form).choices[0].message.content
        ),
    }
    json.dump(said, sys.stdout)


def calls(response: Any) -> list[list[object]]:
    found = response.choices[0].message.tool_calls
    return [[call.function.name, json.loads(call.function.arguments)] for call in found]


if __name__ == "__main__":
    main(sys.argv[1])
