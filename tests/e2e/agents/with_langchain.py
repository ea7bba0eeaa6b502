"""LangChain's ChatOpenAI: bind_tools with a result, and with_structured_output."""

import json
import sys
from typing import Any, Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


@tool
def weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
    """The weather of a city."""
    return f"{city}: sunny"


class Trip(BaseModel):
    """Where to go."""

    city: Literal["Paris", "Rome", "Oslo"]
    by_train: bool


def main(url: str) -> None:
    model: Any = ChatOpenAI(
        model="winnow-tiny", base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=100
    )
    asked = [HumanMessage("How is it in Rome?")]
    called = model.bind_tools([weather], tool_choice="any", parallel_tool_calls=False).invoke(asked)
    results = [
        ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
        for call in called.tool_calls
    ]
    answer = model.bind(max_tokens=8).bind_tools([weather]).invoke([*asked, called, *results])
    trip = model.with_structured_output(Trip).invoke("Where to?")
    by_tool = model.with_structured_output(Trip, method="function_calling").invoke("Where to?")
    said = {
        "calls": [[call["name"], call["args"]] for call in called.tool_calls],
        "results": [result.content for result in results],
        "answer": answer.response_metadata["finish_reason"],
        "trip": trip.model_dump(),
        "by_tool": by_tool.model_dump(),
    }
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
