"""Requests with tools, read without a server: what is asked for, shown, and refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from services.common.settings import Settings
from services.gateway.access.request_limits import RequestLimits
from services.gateway.body import validate
from services.gateway.rest.requests import OpenAIRequest, RequestReader
from services.gateway.served_model import ServedModel
from services.gateway.tools import ToolParameters, ToolUse, read_tools
from tests.winnow import tool_templates
from winnow.answers import AnswerFormat
from winnow.answers.frames import CHANNELS
from winnow.errors import InvalidRequest
from winnow.grammar import Grammar

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says what the sky does",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
ASKED = {"role": "user", "content": "Rain?"}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "noon"}


class Service:
    """What reads requests for a model with this template, and what the prompt is."""

    def __init__(self, model: Path, folder: Path, template: str, **settings: Any) -> None:
        shutil.copytree(model, folder)
        (folder / "chat_template.jinja").write_text(template)
        pruning = {"window_size": 8, "observed_layers": 2, "min_layer": 1}
        self.settings = Settings(model=str(folder), model_name="tiny", pruning=pruning, **settings)
        served = ServedModel.load(self.settings)
        self.tokenizer = served.tokenizer
        self._reader = RequestReader(
            self.settings,
            RequestLimits(self.settings, served),
            served.tokenizer,
            served.new_grammar_compiler(),
        )

    def read(self, *messages: Any, **changes: Any) -> OpenAIRequest:
        return self._reader.chat(
            {"model": "tiny", "messages": list(messages) or [ASKED], **changes}
        )

    def prompt(self, *messages: Any, **changes: Any) -> str:
        prompt = self.read(*messages, **changes).generation.prompts[0]
        return self.tokenizer.decode(prompt.token_ids)

    def answer(self, **changes: Any) -> AnswerFormat | None:
        return self.read(**changes).generation.answer


@pytest.fixture(scope="module")
def service(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("model") / "own"
    return Service(model_path, folder, tool_templates.HERMES)


@pytest.mark.parametrize(
    ("asked", "mode", "name"),
    [
        ({}, "none", None),
        ({"tool_choice": "auto"}, "none", None),
        ({"tools": [], "tool_choice": "none"}, "none", None),
        ({"tools": [TOOL, NOW]}, "auto", None),
        ({"tools": [TOOL, NOW], "tool_choice": "auto"}, "auto", None),
        ({"tools": [TOOL, NOW], "tool_choice": "required"}, "required", None),
        ({"tools": [TOOL, NOW], "tool_choice": "none"}, "none", None),
        (
            {
                "tools": [TOOL, NOW],
                "tool_choice": {"type": "function", "function": {"name": "now"}},
            },
            "named",
            "now",
        ),
    ],
)
def test_whether_tools_may_or_must_be_called(
    asked: dict[str, Any], mode: str, name: str | None
) -> None:
    use = read_tools(validate(ToolParameters, asked), parallel=None)
    assert (use.mode, use.name, use.parallel) == (mode, name, True)
    assert use.tools == ((TOOL, NOW) if mode != "none" else ())
    assert use.callable_tools == ((NOW,) if name else use.tools)
    assert not read_tools(validate(ToolParameters, asked), parallel=False).parallel or (
        mode == "none"
    )


def function(**changes: Any) -> dict[str, Any]:
    return {"tools": [NOW, {"type": "function", "function": {"name": "f"} | changes}]}


def said(**changes: Any) -> dict[str, Any]:
    """A conversation in which the call is changed."""
    return {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL | changes]}, RESULT]}


@pytest.mark.parametrize(
    ("changes", "message", "param"),
    [
        ({"tools": "f"}, "tools is 'f'", "tools"),
        ({"tools": [{}]}, "missing", "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "missing", "tools[0].function"),
        ({"tools": [{"type": "web_search", "x": 1}]}, "'web_search'; only", "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "missing", "tools[0].function.name"),
        (function(name="a b"), "'a b'; it must have 1 to 64", "tools[1].function.name"),
        (function(name=""), "it must have 1 to 64", "tools[1].function.name"),
        (function(name="f" * 65), "it must have 1 to 64", "tools[1].function.name"),
        (function(name="now"), "'now', as that of another", "tools[1].function.name"),
        (function(parameters="{}"), "parameters is '{}'", "tools[1].function.parameters"),
        (function(parameters={"type": "array"}), '"array"; arg', "tools[1].function.parameters"),
        (function(parameters={"type": "objekt"}), '"objekt"; arg', "tools[1].function.parameters"),
        (function(parameters={"type": ["null"]}), "are an obj", "tools[1].function.parameters"),
        (function(strict="yes"), "strict is 'yes'", "tools[1].function.strict"),
        (function(returns={"a": 1}), "unknown", "tools[1].function.returns"),
        ({"tools": [NOW] * 129}, "129 entries; at most 128", "tools"),
        ({"tool_choice": "required"}, "no tools", "tool_choice"),
        ({"tools": [NOW], "tool_choice": "any"}, "'any'; known are none, auto", "tool_choice"),
        (
            {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "'f', which is not among",
            "tool_choice",
        ),
        (
            {"tools": [NOW], "tool_choice": {"type": "function"}},
            "missing",
            "tool_choice.function.name",
        ),
        (
            {"tools": [NOW], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
            "'allowed_tools'; only function",
            "tool_choice.type",
        ),
        ({"messages": [ASKED, {"role": "tool", "content": "a"}]}, "no", "messages[1].tool_call_id"),
        ({"messages": [RESULT | {"content": None}]}, "no content", "messages[0].content"),
        ({"messages": [ASKED | {"tool_call_id": "a"}]}, "unknown", "messages[0].tool_call_id"),
        ({"messages": [ASKED | {"tool_calls": [CALL]}]}, "unknown", "messages[0].tool_calls"),
        ({"messages": [RESULT | {"tool_calls": [CALL]}]}, "unknown", "messages[0].tool_calls"),
        (said(type="custom"), "'custom'; only", "messages[1].tool_calls[0].type"),
        (said(function=None), "missing", "messages[1].tool_calls[0].function"),
        (said(function={}), "missing", "messages[1].tool_calls[0].function.name"),
        (
            said(function={"name": "f", "arguments": {}}),
            "arguments is {}",
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    service: Service, changes: dict[str, Any], message: str, param: str
) -> None:
    messages = changes.get("messages", [ASKED])
    with pytest.raises(InvalidRequest) as error:
        service.read(*messages, **{k: v for k, v in changes.items() if k != "messages"})
    assert message in error.value.message
    assert error.value.param == param


@pytest.mark.parametrize(
    "arguments",
    ["", "{}", "{broken", "[1]", "null", '"a"', '{"a": NaN}', '{"a": "\\ud800"}', "[" * 4000],
)
def test_a_client_may_send_back_whatever_the_model_wrote(service: Service, arguments: str) -> None:
    call = {"function": {"name": "now", "arguments": arguments}}
    text = service.prompt(ASKED, {"role": "assistant", "content": None, "tool_calls": [call]})
    shown = "{}" if arguments == "" else arguments
    assert f'<tool_call>\n{{"name": "now", "arguments": {shown}}}\n</tool_call>' in text


@pytest.mark.parametrize("kind", [{}, {"type": "object"}, {"type": ["object", "null"]}])
def test_a_schema_of_parameters_may_leave_its_type_out(kind: dict[str, Any]) -> None:
    read_tools(validate(ToolParameters, function(parameters=kind)), parallel=None)


def test_results_may_be_of_calls_that_are_not_there(service: Service) -> None:
    text = service.prompt(ASKED, RESULT | {"content": [{"type": "text", "text": "noon"}]})
    assert "<tool_response>\nnoon\n</tool_response>" in text


def test_the_prompt_has_the_tools_that_may_be_called(service: Service) -> None:
    text = service.prompt(tools=[TOOL, NOW])
    shown = {**TOOL, "function": {k: v for k, v in TOOL["function"].items() if k != "strict"}}
    assert f"<tools>\n{json.dumps(shown)}\n{json.dumps(NOW)}\n</tools>" in text
    assert service.prompt(tools=[TOOL], tool_choice="none") == service.prompt()


def test_how_an_answer_is_split(service: Service) -> None:
    answer = service.answer(tools=[TOOL, NOW], parallel_tool_calls=False)
    assert answer is not None and answer.tool_format is not None
    assert (answer.tool_format.name, answer.parallel) == ("hermes", False)
    assert answer.tool_names == {"get_weather", "now"}
    assert (answer.reasoning, answer.shows_reasoning) == ("possible", True)
    closed = service.answer(chat_template_kwargs={"enable_thinking": False})
    assert closed is None
    hidden = service.answer(include_reasoning=False)
    assert hidden is not None and not hidden.shows_reasoning and hidden.tool_format is None


@pytest.fixture(scope="module")
def tagged(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A service whose vocabulary has the tags of calls."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(model_path, folder / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    tokenizer.save_pretrained(folder / "model")
    return Service(folder / "model", folder / "own", tool_templates.HERMES)


def test_a_strict_tools_calls_match_with_auto_where_a_token_begins_them(
    service: Service, tagged: Service
) -> None:
    def grammar(own: Service, *tools: Any, **changes: Any) -> Grammar | None:
        return own.read(tools=list(tools), **changes).generation.grammar

    assert grammar(service, TOOL, NOW) is None
    assert grammar(tagged, NOW) is None
    strict = grammar(tagged, TOOL, NOW)
    assert strict is not None and "ANSWER_TEXT" in strict.source
    required = grammar(tagged, TOOL, NOW, tool_choice="required")
    assert required is not None and "ANSWER_TEXT" not in required.source
    # An object of any properties is right for a tool that is not strict.
    closed = '"additionalProperties": false'
    assert (strict.source.count(closed), required.source.count(closed)) == (1, 2)
    wrong = {"name": "f", "strict": True, "parameters": {"properties": {"a": {"not": {}}}}}
    with pytest.raises(InvalidRequest, match="cannot be enforced") as error:
        grammar(tagged, {"type": "function", "function": wrong})
    assert error.value.param == "tools[0].function.parameters.properties.a"
    assert grammar(tagged, {"type": "function", "function": wrong | {"strict": False}}) is None


def test_an_operator_switches_tools_or_reasoning_off(model_path: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tool_parser": "off", "reasoning_parser": "off"}
    off = Service(model_path, tmp_path / "own", tool_templates.HERMES, **settings)
    with pytest.raises(InvalidRequest, match="switched tools off") as error:
        off.read(tools=[NOW])
    assert error.value.param == "tools"
    assert off.answer() is None
    assert off.read(tools=[NOW], tool_choice="none")
    assert "noon" in off.prompt(ASKED, RESULT)


def test_any_template_is_told_of_tools_by_the_general_form(
    model_path: Path, tmp_path: Path
) -> None:
    tagged = Service(model_path, tmp_path / "a", tool_templates.TAGS)
    with pytest.raises(InvalidRequest, match="set tool_parser to json") as error:
        tagged.read(tools=[NOW])
    assert error.value.param == "tools"
    told = Service(model_path, tmp_path / "b", tool_templates.TAGS, tool_parser="json")
    text = told.prompt(tools=[TOOL])
    assert "You can call these functions:" in text and "<function=" not in text
    answer = told.answer(tools=[TOOL])
    assert answer is not None and answer.tool_format is not None
    assert answer.tool_format.name == "json"


def test_an_operator_names_form_and_reasoning(model_path: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tool_parser": "mistral", "reasoning_parser": "think"}
    own = Service(model_path, tmp_path / "own", "{{ tools }}{{ messages }}", **settings)
    answer = own.answer(tools=[TOOL])
    assert answer is not None and answer.tool_format is not None
    assert (answer.tool_format.name, answer.reasoning) == ("mistral", "possible")


def test_how_much_to_reason_is_in_the_prompt(model_path: Path, tmp_path: Path) -> None:
    own = Service(model_path, tmp_path / "own", tool_templates.HARMONY)
    assert "Reasoning: low" in own.prompt(reasoning_effort="low")
    assert "Reasoning: medium" in own.prompt()


def test_reasoning_that_the_prompt_begins_is_open(model_path: Path, tmp_path: Path) -> None:
    own = Service(model_path, tmp_path / "own", tool_templates.NO_TOOLS)
    answer = own.answer()
    assert answer is not None and answer.reasoning == "open"


@pytest.mark.parametrize(
    ("parser", "asked", "is_split", "begins"),
    [
        ("auto", {}, True, "possible"),
        ("auto", {"tools": [NOW]}, True, "possible"),
        ("auto", {"continue_final_message": True}, True, "none"),
        ("harmony", {}, True, "possible"),
        ("think", {}, False, "possible"),
        ("off", {}, False, None),
        ("off", {"tools": [NOW]}, True, "possible"),
    ],
)
def test_an_answer_in_channels_is_split_by_them(
    model_path: Path,
    tmp_path: Path,
    parser: str,
    asked: dict[str, Any],
    is_split: bool,
    begins: str | None,
) -> None:
    own = Service(model_path, tmp_path / "own", tool_templates.HARMONY, reasoning_parser=parser)
    messages = [ASKED, {"role": "assistant", "content": "Ra"}]
    answer = own.read(*messages, **asked).generation.answer
    assert (answer and answer.reasoning) == begins
    assert (answer is not None and answer.frame is CHANNELS) == is_split


def test_nothing_is_asked_for_by_default() -> None:
    assert ToolUse().callable_tools == ()


def test_what_is_nested_deep_is_text_or_refused_by_name(service: Service) -> None:
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"a": deep}
    called = {"name": "now", "arguments": json.dumps(deep)}
    message = {"role": "assistant", "tool_calls": [CALL | {"function": called}]}
    assert '"a"' in service.prompt(ASKED, message, RESULT, tools=[NOW]).replace("\\", "")
    own = {"type": "function", "function": {"name": "now", "parameters": deep}}
    with pytest.raises(InvalidRequest) as error:
        service.read(tools=[own])
    assert error.value.param == "tools[0].function.parameters"
