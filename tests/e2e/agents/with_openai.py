"""openai: a streamed call of a tool and its result, a parsed answer, and a response."""

import json
import sys
from typing import Any, Literal

from openai import OpenAI
from pydantic import BaseModel

MODEL = "winnow-tiny"
CITIES = ["Paris", "Rome", "Oslo"]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "of a city", "parameters": PARAMETERS}


class Trip(BaseModel):
    city: Literal["Paris", "Rome", "Oslo"]
    by_train: bool


def main(url: str) -> None:
    client: Any = OpenAI(base_url=f"{url}/v1", api_key="none")
    messages: list[dict[str, object]] = [{"role": "user", "content": "How is it in Rome?"}]
    with client.chat.completions.stream(
        model=MODEL,
        messages=messages,
        tools=[{"type": "function", "function": WEATHER}],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
    ) as stream:
        deltas = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    (call,) = choice.message.tool_calls
    messages.append(choice.message.to_dict(exclude_unset=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    answered = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        tools=[{"type": "function", "function": WEATHER}],
        max_tokens=8,
        temperature=0,
    )
    parsed = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Where to?"}],
        response_format=Trip,
        temperature=0,
    )
    response = client.responses.create(
        model=MODEL,
        input="How is it in Oslo?",
        tools=[{"type": "function", **WEATHER, "strict": True}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=100,
        temperature=0,
    )
    trip = client.responses.parse(model=MODEL, input="Where to?", text_format=Trip, temperature=0)
    said = {
        "finish_reason": choice.finish_reason,
        "call": [call.function.name, json.loads(call.function.arguments)],
        "events": sorted(set(deltas)),
        "answered": answered.choices[0].finish_reason,
        "parsed": parsed.choices[0].message.parsed.model_dump(),
        "response": [[item.type, json.loads(item.arguments)] for item in response.output],
        "response_parsed": trip.output_parsed.model_dump(),
    }
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
