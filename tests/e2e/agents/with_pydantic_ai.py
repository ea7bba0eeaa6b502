"""pydantic-ai: an agent whose output has a type, and that has a tool."""

import json
import sys
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Trip(BaseModel):
    """Where to go."""

    city: Literal["Paris", "Rome", "Oslo"]
    by_train: bool


def weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
    """The weather of a city."""
    return f"{city}: sunny"


def main(url: str) -> None:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    model = OpenAIChatModel("winnow-tiny", provider=provider)
    settings: Any = {"temperature": 0, "max_tokens": 100, "parallel_tool_calls": False}
    by_tool: Any = Agent(model, output_type=Trip, model_settings=settings)
    by_schema: Any = Agent(
        model, output_type=NativeOutput(Trip), model_settings=settings, tools=[weather]
    )
    said = {
        "by_tool": by_tool.run_sync("Where to?").output.model_dump(),
        "by_schema": by_schema.run_sync("Where to?").output.model_dump(),
    }
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
